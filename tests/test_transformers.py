"""The callback in real runs of the Trainer of transformers, against a loop by hand."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from integration_tools import CLIP, require_same, rows_of
from torch import nn

import gradstats
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.integrations.schedule import Schedule
from gradstats.schedulers import milestones

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gradstats.integrations.transformers import GradStatsCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_positions=12, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(size=40):
    """Sentences of 3 to 10 tokens, filled up to 10; what fills them has no part in the loss."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(size):
        n = int(torch.randint(3, 11, (), generator=generator))
        ids = torch.randint(1, 48, (10,), generator=generator)
        mask = torch.arange(10) < n
        labels = torch.where(mask, ids, -100)
        out.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return out


def classes():
    return [{**text, "labels": text["input_ids"][0] % 3} for text in texts()]


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(model, dataset, tmp_path, callback_options=None, resume=None, **options):
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "max_grad_norm": CLIP,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "optim": "sgd", "seed": 3,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(tmp_path), **{**settings, **options})
    trainer = InOrder(model, args, train_dataset=dataset)
    callback = GradStatsCallback(trainer, **(callback_options or {}))
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def by_hand(model, dataset, accumulation, *, tokens, change=None, decay=False, autocast=False):
    """Rows of the same training; `tokens`: the loss is a mean over all tokens of a step."""
    rows, batches = [], [dataset[i : i + 4] for i in range(0, len(dataset), 4)]
    batches = [{k: torch.stack([d[k] for d in b]) for k in b[0]} for b in batches]
    optimizer, start = torch.optim.SGD(model.parameters(), 0.01), accumulation
    monitor = gradstats.attach(model, optimizer=optimizer)
    log = gradstats.Log(monitor, rows_of(rows), every=1, layers=False)
    model.train()
    while batches:
        accumulation = (change or {}).get(log.steps, accumulation)
        if change:  # twice the batch, twice the rate
            optimizer.param_groups[0]["lr"] = 0.01 * accumulation / start
        if decay:  # to 0 over all samples, in steps of the size at the start
            taken = (len(dataset) - 4 * len(batches)) // (4 * start)
            optimizer.param_groups[0]["lr"] *= 1 - taken / (len(dataset) // (4 * start))
        step, batches = batches[:accumulation], batches[accumulation:]
        count = sum(int((b["labels"] != -100).sum()) for b in step) if tokens else 1
        losses = []
        for batch in step:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits, labels = logits.float(), batch["labels"]
            if tokens:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            how = "sum" if tokens else "mean"
            loss = nn.functional.cross_entropy(logits, labels, reduction=how) / count
            loss.backward()
            losses.append(loss.detach())
        stats = monitor.step()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=torch.stack(losses).sum())
    monitor.detach()
    return rows


@pytest.mark.parametrize(
    ("make", "accumulation", "bf16"),
    [(gpt2, 1, False), (gpt2, 4, False), (gpt2, 2, True), (bert, 3, False)],
)
def test_the_numbers_of_a_plain_loop(tmp_path, make, accumulation, bf16) -> None:
    """GPT-2's loss is a mean over the tokens of the step, BERT's over the samples of a micro-batch."""
    rows, model = [], make()
    dataset = texts() if make is gpt2 else classes()
    options = {"gradient_accumulation_steps": accumulation, "bf16": bf16}
    _, callback = train(model, dataset, tmp_path, {"sinks": [rows_of(rows)]}, **options)
    other = make()
    tokens = make is gpt2
    require_same(rows, by_hand(other, dataset, accumulation, tokens=tokens, autocast=bf16), 1e-4)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert callback.monitor.noise_scale().coverage == 1.0


SIZES = functools.partial(milestones, sizes={0: 8, 16: 12})  # asked for after step 2, of 4 batches
GROWING = Schedule(SIZES, rule="linear", every=1)


def test_the_batch_size_changes_and_the_learning_rate_with_it(tmp_path) -> None:
    """3 batches a step from step 4 on: 6 is the first number of batches that 2 and 3 divide."""
    rows, model = [], gpt2()
    options = {"sinks": [rows_of(rows)], "schedule": GROWING}
    trainer, callback = train(
        model, texts(), tmp_path, options, gradient_accumulation_steps=2, lr_scheduler_type="linear"
    )
    other = gpt2()
    changed = by_hand(other, texts(), 2, tokens=True, change={3: 3}, decay=True)
    require_same(rows, changed, 1e-4)
    assert [row["batch_size"] for row in rows] == [8, 8, 8, 12, 4]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert [(c.step, c.batch_size) for c in callback.run.follower.changes] == [(3, 12)]
    # 40 samples are 5 steps of 8: the schedule, laid out for those, is at its end.
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}
    assert trainer.args.gradient_accumulation_steps == 2


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path, restore) -> None:
    def run(**options):
        rows = []
        made = {"sinks": [rows_of(rows)], "log_every": 1}
        _, callback = train(
            gpt2(), texts(), tmp_path, made, gradient_accumulation_steps=2, num_train_epochs=2,
            restore_callback_states_from_checkpoint=restore, **options,
        )  # fmt: skip
        return rows, callback

    whole, callback = run(save_strategy="steps", save_steps=3)
    rows, again = run(resume=str(tmp_path / "checkpoint-6"))
    require_same(rows, whole[6:])
    assert again.monitor.state_dict() == callback.monitor.state_dict()


def test_a_run_resumed_after_a_change_says_what_is_seen_again(tmp_path) -> None:
    """It goes on after 8 batches, which 3 does not divide: 3 a step from the next epoch on."""
    rows, settings = [], {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    options = {"schedule": GROWING, "sinks": [rows_of(rows)]}
    train(gpt2(), texts(), tmp_path, options, save_strategy="steps", save_steps=4, **settings)
    rows.clear()
    with pytest.warns(UserWarning, match=r"36 samples were seen, and the Trainer.* after 32"):
        _, callback = train(
            gpt2(), texts(), tmp_path, options, resume=str(tmp_path / "checkpoint-4"), **settings
        )
    assert [row["batch_size"] for row in rows] == [8, 12, 12, 12, 4]
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([0.01, 0.015, 0.015, 0.015, 0.015])
    found = [(c.step, c.batch_size) for c in callback.run.follower.changes]
    assert found == [(3, 12), (5, 12)]


def test_a_checkpoint_without_the_callback_is_gone_on_from(tmp_path) -> None:
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        optim="sgd",
    )  # fmt: skip
    InOrder(gpt2(), args, train_dataset=texts()).train()
    resume = str(tmp_path / "checkpoint-2")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "resume": resume}
    _, callback = train(gpt2(), texts(), tmp_path, **options)
    assert callback.monitor.noise_scale().num_samples == 8
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert "GradStatsCallback" in state["stateful_callbacks"]


def test_reporters_get_the_numbers_beside_the_trainers_own(tmp_path) -> None:
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((state.global_step, dict(logs)))

    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, logging_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = InOrder(gpt2(), args, train_dataset=texts(), callbacks=[Reporter()])
    callback = GradStatsCallback(trainer, prefix="noise/", layers=True)
    trainer.add_callback(callback)
    trainer.train()
    ours = {step: logs for step, logs in seen if "noise/tr_sigma" in logs}
    assert list(ours) == [1, 2, 4, 5]  # the last one too
    assert ours[5]["noise/tr_sigma"] == callback.monitor.noise_scale().tr_sigma
    assert "noise/layer_share/transformer.wte.weight" in ours[5]
    assert [step for step, logs in seen if "grad_norm" in logs] == [2, 4]
    assert json.dumps(trainer.state.log_history, allow_nan=False)
    assert "training_step" not in trainer.__dict__


def test_a_reporter_that_fails_ends_no_training(tmp_path, monkeypatch) -> None:
    log = InOrder.log

    def failing(self, logs, *args, **named):
        if any(name.startswith("gradstats/") for name in logs):
            raise ConnectionError("no route to host")
        log(self, logs, *args, **named)

    monkeypatch.setattr(InOrder, "log", failing)
    rows: list = []
    said = r"sink GradStatsCallback._track failed at step 1 \(ConnectionError: no route to host\)"
    with pytest.warns(UserWarning, match=said) as warned:
        trainer, _ = train(gpt2(), texts(), tmp_path, {"sinks": [rows_of(rows)]})
    assert len([w for w in warned if "no route" in str(w.message)]) == 1
    assert trainer.state.global_step == 10
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert len([row for row in trainer.state.log_history if "grad_norm" in row]) == 10


def test_refused(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="needs the Trainer that it is added to"):
        GradStatsCallback()
    options = {"schedule": Schedule(SIZES, min_batch_size=4)}
    with pytest.raises(InvalidArgumentError, match="below the 8 samples that the training starts"):
        train(gpt2(), texts(), tmp_path, options, gradient_accumulation_steps=2)
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(GradStatsError, match="nothing was measured yet"):
        _ = GradStatsCallback(InOrder(gpt2(), args)).monitor


def test_an_interrupted_training_can_be_begun_again(tmp_path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2 and args.seed == 3:
                args.seed = 4
                raise KeyboardInterrupt

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        save_strategy="no",
    )  # fmt: skip
    model = gpt2()
    trainer = InOrder(model, args, train_dataset=texts(), callbacks=[Stop()])
    callback = GradStatsCallback(trainer)
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.monitor.noise_scale().num_samples == 16
    trainer.train()
    assert callback.monitor.noise_scale().num_samples == 24
    gradstats.attach(model).detach()
