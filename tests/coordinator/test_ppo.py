"""PPOTrainer: its loss against a plain reference, a bandit, exact resuming, peft, unscored completions."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from appa_secure.errors import ConfigError, RunError
from coordinator.minibatches import PromptSampler
from coordinator.policies import WEIGHTS, build_tiny, build_tokenizer
from coordinator.ppo import PPOTrainer, latest_checkpoint, make_config

PROMPTS = ["which way | left | right =", "how much tea | none | some | all of it =", "why ="] * 2
SIZES = {
    "steps": 2,
    "prompts_per_step": 4,
    "generations": 2,
    "epochs": 2,
    "minibatch_size": 4,
    "lr": 1e-2,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coef": 0.5,
    "gamma": 0.9,
    "lam": 0.8,
    "kl_coef": 0.1,
    "temperature": 0.7,
    "entropy_coef": 0.01,
    "max_grad_norm": 1.0,
    "checkpoint_every": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(PROMPTS, 70)


def tiny(tokenizer, seed=0, dim=16, layers=2):
    return build_tiny(tokenizer, dim, layers, heads=2, seed=seed)


def length_reward(completions, **_):
    return [0.1 * len(text.split()) for text in completions]


def trainer(
    tmp_path, tokenizer, model=None, reward=length_reward, prompts=PROMPTS, on_step=None, peft=None, **sizes
):
    extra = {k: sizes.pop(k) for k in list(sizes) if k not in SIZES}
    config = make_config(SimpleNamespace(**{**SIZES, **sizes}), tmp_path, 3, extra.pop("length", 5), **extra)
    data = Dataset.from_dict({"prompt": list(prompts), "qid": [f"q{i}" for i in range(len(prompts))]})
    model = tiny(tokenizer) if model is None else model
    return PPOTrainer(model, reward, config, data, tokenizer, peft_config=peft, on_step=on_step)


def rollouts(ppo):
    """One rollout batch as the trainer makes it, and the reward function's rows."""
    ppo.model.train()
    rows = [ppo.train_dataset[i] for i in range(4) for _ in range(2)]
    return ppo._generate_and_score_completions(rows)


def plain_logps(model, prompt, completion, temperature):
    """Log-probs, entropies and hidden states of one completion: no padding, no cache, one row."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
    logp = torch.log_softmax(out.logits[0] / temperature, dim=-1)[len(prompt) - 1 : -1]
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp[range(len(completion)), completion]
    return chosen, entropy, out.hidden_states[-1][0, len(prompt) - 1 : -1]


def moved(model, seed, scale=0.05):
    """A copy of the weights after a random step, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + scale * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prompt_baseline", [True, False])
def test_the_loss_of_a_batch_is_what_the_papers_say(tmp_path, tokenizer, prompt_baseline):
    model = tiny(tokenizer)
    start, later = copy.deepcopy(model), copy.deepcopy(model)
    later.load_state_dict(moved(model, 1))
    later.tie_weights()
    # The policy that samples is neither the reference nor the policy that is updated.
    middle = copy.deepcopy(model)
    middle.load_state_dict(moved(model, 2))
    middle.tie_weights()
    ppo = trainer(tmp_path, tokenizer, model, prompt_baseline=prompt_baseline)
    torch.nn.init.normal_(ppo.critic.net[-1].weight)
    ppo.model.load_state_dict(middle.state_dict())
    batch = rollouts(ppo)
    before = copy.deepcopy(ppo.critic)
    torch.nn.init.normal_(ppo.critic.net[-1].weight)
    ppo.model.load_state_dict(later.state_dict())
    ppo.current_gradient_accumulation_steps = 1
    loss = ppo._compute_loss(ppo.model, batch)

    a = ppo.args
    rows, scores = [], []
    for i in range(8):
        completion = batch["completion_ids"][i][batch["completion_mask"][i] > 0].tolist()
        scores.append(0.1 * len(tokenizer.decode(completion, skip_special_tokens=True).split()))
    for i in range(8):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] > 0].tolist()
        completion = batch["completion_ids"][i][batch["completion_mask"][i] > 0].tolist()
        score = scores[i] - scores[i ^ 1] if prompt_baseline else scores[i]  # i ^ 1: the other of the pair
        old, _, old_hidden = plain_logps(middle, prompt, completion, a.temperature)
        ref, _, _ = plain_logps(start, prompt, completion, a.temperature)
        new, entropy, hidden = plain_logps(later, prompt, completion, a.temperature)
        with torch.no_grad():
            old_values, values = before(old_hidden).tolist(), ppo.critic(hidden).tolist()
        reward = [-a.kl_coef * (o - r) for o, r in zip(old.tolist(), ref.tolist(), strict=True)]
        reward[-1] += score
        following, advantage = 0.0, []
        for t in reversed(range(len(completion))):
            ahead = old_values[t + 1] if t + 1 < len(completion) else 0.0
            following = reward[t] + a.gamma * ahead - old_values[t] + a.gamma * a.lam * following
            advantage.insert(0, following)
        targets = [x + v for x, v in zip(advantage, old_values, strict=True)]
        rows.append((advantage, targets, old.tolist(), new.tolist(), entropy.tolist(), old_values, values))
    flat = [[x for row in rows for x in row[k]] for k in range(7)]
    advantage = torch.tensor(flat[0])
    advantage = ((advantage - advantage.mean()) / advantage.std(correction=0)).tolist()
    policy, value, count = 0.0, 0.0, len(advantage)
    for adv, target, old, new, _, old_v, v in zip(advantage, *flat[1:], strict=True):
        ratio = torch.tensor(new - old).exp().item()
        policy -= min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv) / count
        bounded = old_v + min(max(v - old_v, -0.2), 0.2)
        value += 0.5 * max((v - target) ** 2, (bounded - target) ** 2) / count
    expected = policy + 0.5 * value - 0.01 * sum(flat[4]) / count
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert abs(policy) > 1e-3
    assert value > 1e-3


def test_prompts_read_once_give_the_same_numbers_and_gradients_as_prompts_read_n_times(tmp_path, tokenizer):
    ppo = trainer(tmp_path, tokenizer)
    batch = rollouts(ppo)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    found = []
    for group in (1, 2):
        ppo.model.zero_grad()
        logps, entropy, hidden = ppo._score(ppo.model, ids, mask, batch["completion_ids"].size(1), group)
        keep = batch["completion_mask"] > 0
        (logps[keep].sum() + entropy[keep].sum() + hidden[keep].sum()).backward()
        grads = [p.grad.clone() for p in ppo.model.parameters()]
        found.append((logps[keep].detach(), entropy[keep].detach(), hidden[keep].detach(), grads))
    for one, many in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.allclose(one, many, atol=1e-5)
    for one, many in zip(found[0][3], found[1][3], strict=True):
        assert torch.allclose(one, many, atol=1e-4, rtol=1e-4)
    assert torch.allclose(found[0][0], batch["old_logps"][keep], atol=1e-5)


def test_the_reward_function_is_asked_once_per_step_about_the_prompts_of_the_sampler(tmp_path, tokenizer):
    asked, seen = [], []

    def reward(prompts, completions, qid, trainer_state, log_metric, **_):
        asked.append((trainer_state.ppo_step, list(qid)))
        log_metric("malformed", 0.25)
        return [0.5] * len(prompts)

    ppo = trainer(tmp_path, tokenizer, reward=reward, on_step=seen.append, steps=3)
    ppo.train()
    assert [step for step, _ in asked] == [1, 2, 3]
    assert [row["step"] for row in seen] == [1, 2, 3]
    sampler = iter(PromptSampler(len(PROMPTS), 4, 2, 1, 3, 3))
    assert [qid for _, qids in asked for qid in qids] == [f"q{i}" for i in sampler]
    assert seen[0]["reward"] == pytest.approx(0.5)
    assert seen[0]["malformed"] == 0.25
    assert seen[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert seen[2]["kl"] != 0.0
    assert {"entropy", "clip_fraction", "policy_loss", "value_loss", "length", "seconds"} <= seen[0].keys()


def test_a_bandit_with_a_known_optimum_is_solved(tmp_path, tokenizer):
    """One token decides: the reward of weight w is w / 10, nothing else pays; the optimum is 1."""

    def reward(completions, **_):
        return [int(text) / 10 if text in WEIGHTS else 0.0 for text in completions]

    rewards = []
    ppo = trainer(
        tmp_path,
        tokenizer,
        reward=reward,
        prompts=["how much ="],
        on_step=lambda row: rewards.append(row["reward"]),
        length=1,
        steps=40,
        prompts_per_step=32,
        generations=4,
        minibatch_size=64,
        kl_coef=0.0,
        temperature=1.0,
        gamma=1.0,
        entropy_coef=0.0,
    )
    ppo.train()
    assert rewards[0] < 0.3
    assert min(rewards[-3:]) > 0.95


def test_unscored_completions_take_part_in_nothing(tmp_path, tokenizer):
    def reward(completions, **_):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    ppo = trainer(tmp_path, tokenizer, reward=reward)
    batch = rollouts(ppo)
    assert (batch["mask"][1::2] == 0).all()
    assert (batch["advantages"][1::2] == 0).all()
    assert (batch["mask"][::2] == batch["completion_mask"][::2]).all()
    ppo.current_gradient_accumulation_steps = 1
    loss = ppo._compute_loss(ppo.model, batch)
    for name in ("advantages", "returns", "old_values", "old_logps"):
        batch[name][1::2] = 7.0
    assert ppo._compute_loss(ppo.model, batch).item() == pytest.approx(loss.item(), abs=1e-7)


def test_a_step_without_any_score_changes_no_weight(tmp_path, tokenizer):
    seen, weights = [], []

    def reward(completions, trainer_state, **_):
        return [None if trainer_state.ppo_step == 2 else 1.0 for _ in completions]

    def on_step(row):
        seen.append(row)
        weights.append([p.detach().clone() for p in (*ppo.model.parameters(), *ppo.critic.parameters())])

    ppo = trainer(tmp_path, tokenizer, reward=reward, on_step=on_step, steps=3)
    ppo.train()
    assert [row["unscored"] for row in seen] == [0.0, 1.0, 0.0]
    assert seen[1]["reward"] is None
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))


def test_completions_that_end_at_once_train(tmp_path, tokenizer):
    model = tiny(tokenizer)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # whatever is sampled first ends it
    seen = []
    ppo = trainer(tmp_path, tokenizer, model, on_step=seen.append)
    assert rollouts(ppo)["completion_ids"].shape == (8, 1)
    ppo.train()
    assert [row["length"] for row in seen] == [1.0, 1.0]
    assert abs(seen[1]["kl"]) > 1e-6


class Stop(Exception):
    pass


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, tokenizer):
    def run(folder, stop_at=None, resume=False):
        texts = []

        def reward(completions, trainer_state, **_):
            if trainer_state.ppo_step == stop_at:
                raise Stop
            texts.append((trainer_state.ppo_step, list(completions)))
            return length_reward(completions)

        ppo = trainer(tmp_path / folder, tokenizer, reward=reward, steps=6, checkpoint_every=1)
        if stop_at is None:
            ppo.train(resume_from_checkpoint=resume)
        else:
            with pytest.raises(Stop):
                ppo.train()
        return ppo, texts

    whole, texts = run("whole")
    _, first = run("parts", stop_at=4)
    torch.manual_seed(12345)  # whatever the new process did before
    resumed, second = run("parts", resume=True)
    assert [step for step, _ in second] == [4, 5, 6]
    assert first + second == texts
    for one, other in ((whole.model, resumed.model), (whole.critic, resumed.critic)):
        theirs = other.state_dict()
        assert all(torch.equal(x, theirs[name]) for name, x in one.state_dict().items())
    assert any(p.abs().max() > 0 for p in whole.critic.net[-1].parameters())


def test_only_complete_checkpoints_of_the_same_run_are_resumed(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, checkpoint_every=1).train()
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-8"
    (newest / "ppo.json").unlink()
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    with pytest.raises(RunError, match="cut off"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=str(newest))
    with pytest.raises(RunError, match="reference"):
        trainer(tmp_path, tokenizer, tiny(tokenizer, seed=9)).train(resume_from_checkpoint=True)


def test_a_saved_policy_loads_without_this_project(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ppo = trainer(tmp_path, tokenizer)
    ppo.train()
    ppo.save_policy(tmp_path / "policy")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert all(torch.equal(x, ppo.model.state_dict()[name]) for name, x in model.state_dict().items())
    again = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert again(PROMPTS[1])["input_ids"] == tokenizer(PROMPTS[1])["input_ids"]


def test_lora_trains_the_adapter_against_the_model_without_it_and_resumes_exactly(tmp_path, tokenizer):
    from peft import LoraConfig, PeftModel

    def run(folder, stop_at=None, resume=False):
        seen = []

        def on_step(row):
            if row["step"] == stop_at:
                raise Stop
            seen.append(row)

        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        ppo = trainer(tmp_path / folder, tokenizer, peft=lora, on_step=on_step, steps=3, checkpoint_every=1)
        ppo.train(resume_from_checkpoint=resume)
        return ppo, seen

    base = tiny(tokenizer)
    ppo, seen = run("whole")
    assert seen[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(seen[2]["kl"]) > 1e-6
    state = ppo.model.state_dict()
    for name, weight in base.state_dict().items():
        kept = state.get(
            f"base_model.model.{name}", state.get(f"base_model.model.{name[:-7]}.base_layer.weight")
        )
        assert torch.equal(kept, weight)
    ppo.save_policy(tmp_path / "policy")
    loaded = PeftModel.from_pretrained(tiny(tokenizer), tmp_path / "policy").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in state.items() if "lora" in name)
    with pytest.raises(Stop):
        run("parts", stop_at=3)
    resumed, again = run("parts", resume=True)
    assert [row["step"] for row in again] == [3]
    assert all(torch.equal(x, resumed.model.state_dict()[name]) for name, x in state.items())


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"minibatch_size": 3}, "ppo.minibatch_size"),
        ({"minibatch_size": 1, "generations": 2}, "ppo.generations"),
        ({"generations": 1}, "ppo.generations"),
        ({"gamma": 1.5}, "gamma"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"beta": 0.1}, "beta"),
        ({"save_steps": 3, "checkpoint_every": 1}, "save_steps"),
    ],
)
def test_impossible_settings_are_refused_by_name(tmp_path, sizes, field):
    extra = {k: sizes[k] for k in sizes if k not in SIZES}
    known = SimpleNamespace(**{**SIZES, **{k: v for k, v in sizes.items() if k in SIZES}})
    with pytest.raises(ConfigError, match=field):
        make_config(known, tmp_path, 0, 5, **extra)
