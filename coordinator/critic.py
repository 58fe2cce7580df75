"""The critic, and one forward pass that serves policy and critic on the completion tokens alone.

A rollout batch holds several completions of each prompt. Where the model allows it (`coordinator.packing`), each prompt
is read once for all of them and padding is not read at all, with equal results. The head sees the positions that choose
a token and no others.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from coordinator.packing import pack, packable


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
        self._packs = packable(base)
        self._request: tuple[Tensor, int] | None = None
        self._hidden: Tensor | None = None
        backbone.forward = self._forward

    def __call__(
        self, model: nn.Module, ids: Tensor, attention: Tensor, length: int, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, entropies, hidden states) = (B, T), (B, T), (B, T, d) of the last ``length`` = T
        positions, 0 on padding.

        Args:
            model: the outermost wrapper of the language model.
            ids, attention: (B, P + T), prompts padded on the left, completions on the right.
            group: rows are runs of ``group`` completions of one prompt.
        """
        kept = attention[:, -length:] > 0  # (B, T), M of them
        labels = ids[:, -length:][kept].unsqueeze(0)  # (1, M)
        self._request = (kept, group)
        try:
            out = model(input_ids=ids, attention_mask=attention, shift_labels=labels, fused_lm_head=True)
            hidden = self._hidden
        finally:
            self._request = self._hidden = None
        assert hidden is not None  # the backbone ran inside the call
        spread = (_spread(x.squeeze(0), kept) for x in (out.log_probs, out.entropy, hidden))
        log_probs, entropy, hidden = spread
        return log_probs, entropy, hidden

    def _forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if self._request is None:
            return self._read(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kept, group = self._request
        kwargs["use_cache"] = False
        # The state before a token chooses it, so the last token of a completion is never read.
        if self._packs:
            packed = pack(attention_mask, kept.size(1), group)
            kwargs |= {"attention_mask": packed.mask, "position_ids": packed.positions}
            states = self._read(input_ids=input_ids.flatten()[packed.source], **kwargs).last_hidden_state
            hidden = states.flatten(0, 1)[packed.states]  # (M, d)
        else:
            if self._takes_positions:  # the left padding does not count
                kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            kwargs["attention_mask"] = attention_mask[:, :-1]
            states = self._read(input_ids=input_ids[:, :-1], **kwargs).last_hidden_state
            hidden = states[:, -kept.size(1) :][kept]  # (M, d)
        self._hidden = hidden.unsqueeze(0)
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


def _spread(values: Tensor, kept: Tensor) -> Tensor:
    """(M, ...) values at the M places that are kept, 0 elsewhere: (B, T, ...)."""
    return values.new_zeros(*kept.shape, *values.shape[1:]).masked_scatter(
        kept.view(*kept.shape, *[1] * (values.dim() - 1)), values
    )
