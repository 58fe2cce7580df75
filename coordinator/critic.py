"""The critic, and one forward pass that serves policy and critic on the completion tokens alone.

A rollout batch holds several completions of each prompt. The trunk reads each prompt once, repeats its
key/value cache over the prompt's completions and reads only those after it; gradients flow through the cache.
At 50 prompt tokens and 4 completions of 10 tokens this is a third of the work of the plain pass, with equal
results.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head


class Critic(nn.Module):
    """V(s): a small network on the trunk's last hidden state, (B, T, d) -> (B, T) float32.

    The output layer starts at zero, so an untrained critic says 0 everywhere instead of noise.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        # Its own seed, outside the global stream: a critic must not change which completions are sampled.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            output = nn.Linear(dim, 1)
            self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), output)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values in float32 whatever the precision of the trunk."""
        values: Tensor = self.net(hidden.float())
        return values.squeeze(-1)


class CompletionScorer:
    """Makes a causal LM score completions: log-probabilities, entropies and trunk states of the completion
    tokens.

    Installs TRL's fused head on the model and wraps its backbone, so that a call through peft, DDP or
    autocast wrappers still is one forward pass of the outermost model. Without an active request the backbone
    is untouched.
    """

    def __init__(self, base: PreTrainedModel, temperature: float, install_head: bool) -> None:
        """``base``: the language model without peft; ``install_head=False`` where TRL has already installed
        its head."""
        if install_head:
            add_fused_lm_head(base, temperature=temperature, outputs=("log_probs", "entropy"))
        backbone = base.base_model
        self._read = backbone.forward
        self._takes_positions = "position_ids" in inspect.signature(self._read).parameters
        self._request: tuple[int, int] | None = None
        self._hidden: Tensor | None = None
        backbone.forward = self._forward

    def __call__(
        self, model: nn.Module, ids: Tensor, attention: Tensor, length: int, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, entropies, hidden states) = (B, T), (B, T), (B, T, d) of the last ``length`` = T
        positions.

        Args:
            model: the outermost wrapper of the language model.
            ids, attention: (B, P + T), prompts padded on the left, completions on the right.
            group: rows are runs of ``group`` completions of one prompt (> 1 reads the prompt once), 1 if not.

        Log-probs and entropies are 0 on padding.
        """
        labels = ids[:, -length:].masked_fill(attention[:, -length:] == 0, -100)
        self._request = (length, group)
        try:
            out = model(input_ids=ids, attention_mask=attention, shift_labels=labels, fused_lm_head=True)
            hidden = self._hidden
        finally:
            self._request = self._hidden = None
        assert hidden is not None  # the backbone ran inside the call
        return out.log_probs, out.entropy, hidden

    def _forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if self._request is None:
            return self._read(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        length, group = self._request
        prompt = input_ids.size(1) - length
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, P + T), the left padding does not count

        def read(rows: slice, columns: slice, upto: int, **cache: Any) -> Any:
            inputs = {"input_ids": input_ids[rows, columns], "attention_mask": attention_mask[rows, :upto]}
            where = {"position_ids": position[rows, columns]} if self._takes_positions else {}
            return self._read(**{**kwargs, **inputs, **where, **cache})

        # The state at position P + t - 1 chooses token t, so the last token of the completion is never read.
        if group == 1:
            whole = read(slice(None), slice(0, -1), prompt + length - 1, use_cache=False)
            hidden = whole.last_hidden_state[:, prompt - 1 :]  # (B, T, d)
        else:
            head = read(slice(None, None, group), slice(0, prompt), prompt, use_cache=True)
            hidden = head.last_hidden_state[:, -1:].repeat_interleave(group, dim=0)  # (B, 1, d)
            if length > 1:
                head.past_key_values.batch_repeat_interleave(group)
                cache = {"use_cache": True, "past_key_values": head.past_key_values}
                tail = read(slice(None), slice(prompt, -1), prompt + length - 1, **cache)
                hidden = torch.cat([hidden, tail.last_hidden_state], dim=1)  # (B, T, d)
        self._hidden = hidden
        return BaseModelOutputWithPast(last_hidden_state=hidden)
