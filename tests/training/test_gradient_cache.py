"""A batch in chunks against the plain batch: losses, gradients, dropout, ranks, and the Trainer around it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_groups
from transformers import TrainerCallback

from icone_hf import FeatureCache, IConETrainer, IConETrainingArguments, Stage
from icone_hf.data.batching import Pair, PairChunks, PairCollator, PairDataset
from icone_hf.modeling import losses, objective
from icone_hf.modeling.objective import TAUGHT_LOSSES, Teachers
from icone_hf.training.gradient_cache import backward_in_chunks
from icone_hf.training.stage_trainer import StageTrainer

NUM_GROUPS = 8
# Ten pairs: every group once, the first two of them with a second sentence.
PAIRS = [Pair(row, row % 3) for row in range(NUM_GROUPS)] + [Pair(0, 1), Pair(1, 2)]
CONFIGS = {
    "infonce": {},
    "hard negatives, smoothed labels": {"hard_negative_beta": 0.5, "instance_label_smoothing": 0.1},
    "learned temperature": {"learn_temperature": True},
    "sigmoid": {"contrastive_loss": "sigmoid", "learn_temperature": True},
    "several positives": {"several_positives": True},
    "sigmoid, several positives": {"contrastive_loss": "sigmoid", "several_positives": True},
    "max_hinge": {"contrastive_loss": "max_hinge"},
    "sum_hinge": {"contrastive_loss": "sum_hinge"},
    "cosine": {"instance_logits": "cosine", "instance_temperature": 0.1},
    "nested": {"nested_dims": [8, 3], "instance_logits": "cosine", "contrastive_loss": "sigmoid"},
}


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p


@pytest.fixture
def model_of(make_model):
    def make(dropout=0.0, **config):
        model = make_model(num_groups=NUM_GROUPS, text_pooling="mean", **config).train()
        set_dropout(model, dropout)
        return model

    return make


@pytest.fixture
def read(processor):
    """`read(pairs, chunk_size)`: the batch's chunks, each padded to its own longest sentence."""
    dataset, collator = PairDataset(make_groups(NUM_GROUPS)), PairCollator(processor)

    def read(pairs, chunk_size):
        chunks = [pairs[i : i + chunk_size] for i in range(0, len(pairs), chunk_size)]
        return [collator([dataset[pair] for pair in chunk]) for chunk in chunks]

    return read


def ids_of(pairs):
    return torch.tensor([pair.group_id for pair in pairs])


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours, expected, rtol=1e-5):
    """Within `rtol` of each parameter's norm. Rounding alone is left of some (a softmax does not see a key's bias)."""
    assert ours.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= rtol * gradient.norm() + 1e-7 * largest, name


def in_chunks(model, read, pairs, chunk_size, instance_weight=1.0, contrastive_weight=1.0, **options):
    output = backward_in_chunks(
        model, lambda: read(pairs, chunk_size), ids_of(pairs), instance_weight, contrastive_weight, **options
    )
    return output, gradients_of(model)


def plain(model, read, pairs, instance_weight=1.0, contrastive_weight=1.0, **inputs):
    (batch,) = read(pairs, len(pairs))
    output = model(**batch, **inputs, instance_weight=instance_weight, contrastive_weight=contrastive_weight)
    output.loss.backward()
    return output, gradients_of(model)


def assert_same_losses(ours, expected):
    for name in ("loss", "instance_loss", "contrastive_loss", *TAUGHT_LOSSES):
        if getattr(expected, name) is None:
            assert getattr(ours, name) is None
        else:
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_without_dropout_it_is_the_plain_batch(model_of, read, config, weights):
    model = model_of(**config)
    ours, our_gradients = in_chunks(model, read, PAIRS, 4, *weights)
    expected, gradients = plain(model, read, PAIRS, *weights)
    assert_same_losses(ours, expected)
    assert_same_gradients(our_gradients, gradients)
    assert ours.loss.grad_fn is None


@pytest.mark.parametrize("weights", [(0.3, 2.0), (0.0, 1.0)])
def test_teachers_of_the_whole_batch_teach_its_chunks(model_of, read, weights):
    model = model_of(**dict.fromkeys(TAUGHT_LOSSES.values(), 0.6))
    filled = [*PAIRS, Pair(3, 0, is_filler=True)]
    teachers = Teachers(*(torch.randn(len(filled), 5) for _ in Teachers._fields))
    ours, our_gradients = in_chunks(model, read, filled, 4, *weights, teachers=teachers)
    inputs = {f"teacher_{name}": rows for name, rows in teachers._asdict().items()}
    expected, gradients = plain(model, read, filled, *weights, **inputs)
    assert_same_losses(ours, expected)
    assert_same_gradients(our_gradients, gradients)


@given(st.integers(1, 12), st.integers(0, 4), st.sampled_from(["infonce", "sigmoid", "several positives"]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_the_chunks_size_nor_fillers_matter(model_of, read, chunk_size, fillers, config):
    model = model_of(**CONFIGS[config])
    filled = PAIRS + [Pair(3, 0, is_filler=True)] * fillers  # up to a chunk of nothing else
    ours, our_gradients = in_chunks(model, read, filled, chunk_size)
    expected, gradients = plain(model, read, PAIRS)
    assert_same_losses(ours, expected)
    assert_same_gradients(our_gradients, gradients)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize(
    ("config", "checkpointing"), [("infonce", False), ("sigmoid", False), ("cosine", False), ("infonce", True)]
)
def test_dropout_is_that_of_the_first_pass(model_of, read, config, checkpointing, device):
    """Against a graph through all chunks at once, which draws each chunk's dropout one time, and the bare losses."""
    model = model_of(dropout=0.3, vision_feature_dropout=0.3, text_feature_dropout=0.1, **CONFIGS[config]).to(device)
    if checkpointing:  # runs every layer once more in the backward pass, and replays its dropout too
        model.gradient_checkpointing_enable()
    chunks = [{name: value.to(device) for name, value in chunk.items()} for chunk in read(PAIRS, 4)]
    ids, form = ids_of(PAIRS).to(device), model.config.instance_logits
    generator_state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    torch.manual_seed(5)
    outputs = [model(**chunk, return_loss=False) for chunk in chunks]
    images, texts = (
        torch.cat([output[name].pooler_output for output in outputs])
        for name in ("vision_model_output", "text_model_output")
    )
    where_it_ends = generator_state()
    instance = sum(losses.instance_loss(f, model.classifier.weight, ids, form, 0.1) for f in (images, texts))
    embeds = [torch.nn.functional.normalize(features, dim=-1) for features in (images, texts)]
    if config == "sigmoid":
        contrastive = losses.sigmoid_loss(*embeds, torch.exp(-model.logit_scale), model.logit_bias, ids)
    else:
        contrastive = losses.contrastive_loss(*embeds, model.config.temperature, ids)
    (instance + 2 * contrastive).backward()
    gradients = gradients_of(model)

    torch.manual_seed(5)
    ours = backward_in_chunks(model, lambda: chunks, ids, 1.0, 2.0)
    torch.testing.assert_close(ours.loss, (instance + 2 * contrastive).detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients_of(model), gradients)
    assert torch.equal(generator_state(), where_it_ends)  # the next step draws other numbers
    backward_in_chunks(model, lambda: chunks, ids, 1.0, 2.0)
    name = "text_projection.weight"
    assert (gradients_of(model)[name] - gradients[name]).norm() > 0.01 * gradients[name].norm()


def test_no_pass_sees_more_than_a_chunk(model_of, read, monkeypatch):
    """Activations are those of a chunk, and so are the instance loss's logits of pairs and groups."""
    model, rows = model_of(), []
    instance_loss = objective.instance_loss
    monkeypatch.setattr(
        objective, "instance_loss", lambda f, *rest, **kw: rows.append(len(f)) or instance_loss(f, *rest, **kw)
    )
    for tower in (model.vision_model, model.text_model):
        tower.register_forward_hook(lambda module, args, output: rows.append(len(output.last_hidden_state)))
    in_chunks(model, read, PAIRS, 4)
    assert sorted(rows) == sorted([4, 4, 2] * 2 * (2 + 1))  # both modalities: towers twice, the instance loss once


def test_a_scaled_backward_scales_all_gradients_alike(model_of, read):
    """As float16's gradient scaler does."""
    model = model_of(**CONFIGS["sigmoid"])
    scaled = in_chunks(model, read, PAIRS, 4, backward=lambda loss: (loss * 1024).backward(), loss_scale=1024.0)[1]
    assert_same_gradients({name: g / 1024 for name, g in scaled.items()}, plain(model, read, PAIRS)[1])


# --- reading ---


def test_chunks_are_read_one_at_a_time_and_twice_alike(processor):
    class Counting(PairDataset):
        count = 0

        def __getitem__(self, pair):
            Counting.count += 1
            return super().__getitem__(pair)

    dataset, collator = Counting(make_groups(NUM_GROUPS)), PairCollator(processor)
    batch = PairChunks(dataset, collator, chunk_size=4).__getitems__(PAIRS)
    assert batch["group_ids"].tolist() == [pair.row for pair in PAIRS]
    assert Counting.count == 0
    before = torch.get_rng_state()
    passes = batch["read_chunks"](), batch["read_chunks"]()
    first = [next(passes[0])]
    assert Counting.count == 4
    first += passes[0]
    second = list(passes[1])
    assert torch.equal(torch.get_rng_state(), before)
    expected = [collator([dataset[pair] for pair in PAIRS[i : i + 4]]) for i in (0, 4, 8)]
    for chunks in (first, second):
        for chunk, same in zip(chunks, expected, strict=True):
            assert all(torch.equal(chunk[name], same[name]) for name in same)
    # Padded to the chunk's own longest sentence, not to the batch's.
    lengths = [chunk["attention_mask"].sum(dim=1).max().item() for chunk in first]
    assert [chunk["input_ids"].shape[1] for chunk in first] == lengths


def test_worker_processes_read_the_same_chunks_for_one_batch_after_another(processor):
    dataset, collator = PairDataset(make_groups(NUM_GROUPS)), PairCollator(processor)
    alone, helped = (PairChunks(dataset, collator, 3, num_workers=workers) for workers in (0, 2))
    for pairs in (PAIRS, PAIRS[::-1]):
        for _ in range(2):
            chunks = [list(reader.__getitems__(pairs)["read_chunks"]()) for reader in (alone, helped)]
            for ours, expected in zip(*chunks, strict=True):
                assert all(torch.equal(ours[name], expected[name]) for name in expected)


# --- in the Trainer ---


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def train(model_of, processor, tmp_path):
    """One update of a stage: the gradients, the log, and the model."""

    def train(output, weights=(1.0, 1.0), **arguments):
        values = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1}
        values |= {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-3}
        args = IConETrainingArguments(str(tmp_path / output), **{**values, **arguments})
        stage, watch = Stage("joint", 1, 1e-3, *weights, train_encoders=True), Watch()
        model, groups = model_of(**CONFIGS["sigmoid"]), make_groups(NUM_GROUPS)
        trainer = StageTrainer(model, args, stage, PairDataset(groups), groups, processor, [watch])
        trainer.train()
        return watch.gradients[0], trainer.state.log_history[0], model

    return train


def test_clipping_and_logs_are_those_of_the_plain_path(train):
    ours, log, _ = train("chunks", global_batch_size=12, per_device_chunk_size=5, max_grad_norm=0.01)
    expected, plain_log, _ = train("plain", per_device_train_batch_size=12, max_grad_norm=0.01)
    assert_same_gradients(ours, expected)
    assert torch.cat([gradient.flatten() for gradient in ours.values()]).norm() == pytest.approx(0.01, rel=1e-3)
    assert {"loss", "instance_loss", "contrastive_loss", "grad_norm"} <= log.keys()
    assert log == pytest.approx(plain_log, rel=1e-5)


def test_mixed_precision_is_that_of_the_plain_path(train):
    """bfloat16 has 8 bits: the same numbers but for rounding, and far from float32's."""
    ours, log, _ = train("chunks", global_batch_size=12, per_device_chunk_size=5, bf16=True, max_grad_norm=0.0)
    expected, plain_log, _ = train("plain", per_device_train_batch_size=12, bf16=True, max_grad_norm=0.0)
    assert_same_gradients(ours, expected, rtol=0.03)
    assert log["contrastive_loss"] == pytest.approx(plain_log["contrastive_loss"], rel=1e-3)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}


def test_a_share_that_fits_a_chunk_is_a_plain_batch(train, monkeypatch):
    monkeypatch.setattr("icone_hf.training.stage_trainer.backward_in_chunks", None)
    train("chunk", global_batch_size=12, per_device_chunk_size=12)
    train("larger", global_batch_size=12, per_device_chunk_size=100)


def test_cached_features_come_as_one_batch(model_of, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("icone_hf.training.stage_trainer.backward_in_chunks", None)
    model, groups = model_of(), make_groups(NUM_GROUPS)
    cache = FeatureCache.build(tmp_path / "cache", model, processor, groups)
    args = IConETrainingArguments(
        str(tmp_path),
        global_batch_size=8,
        per_device_chunk_size=2,
        max_steps=1,
        use_cpu=True,
        load_best_model_at_end=False,
        eval_strategy="no",
        save_strategy="no",
    )
    stage = Stage("heads", 1, 1e-3, 1, 1, train_encoders=False)
    trainer = StageTrainer(model, args, stage, cache, groups, processor)
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["pooled_image"]) for batch in batches] == [8, 8, 8]  # 24 pairs
    expected = model(**batches[0], contrastive_weight=1).loss.item()
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def run(model_of, processor, tmp_path):
    def run(**arguments):
        values = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", **arguments}
        stages = (Stage("heads", 1, 1e-3, 1, 0, False), Stage("joint", 1, 1e-3, 1, 1, True))
        args = IConETrainingArguments(str(tmp_path / "run"), **values)
        validation = make_groups(6, start=NUM_GROUPS)
        return IConETrainer(model_of(), args, make_groups(NUM_GROUPS), validation, processor, stages)

    return run


def test_a_run_records_its_batch_and_goes_on_with_chunks_of_another_size(run):
    trainer = run(global_batch_size=6, per_device_chunk_size=4)
    decisive = trainer.recipe()["decisive"]
    assert decisive["global_train_batch_size"] == 6
    metrics = trainer.train()
    assert trainer.folder.read_stage(1)["log_history"][-1]["step"] == 4  # 24 pairs
    assert run(global_batch_size=6, per_device_chunk_size=2).recipe()["decisive"] == decisive
    assert run(per_device_train_batch_size=6).train(resume_from_checkpoint="auto") == metrics
    with pytest.raises(ValueError, match="global_train_batch_size was 6, is 12"):
        run(global_batch_size=12, per_device_chunk_size=4).train(resume_from_checkpoint="auto")


# --- arguments ---


def test_the_global_batch_is_shared_among_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(IConETrainingArguments, "world_size", 4)
    args = IConETrainingArguments(str(tmp_path), global_batch_size=4096, per_device_chunk_size=128)
    assert args.per_device_train_batch_size == 1024
    with pytest.raises(ValueError, match="global_batch_size=4094 must be a multiple of the 4 processes"):
        IConETrainingArguments(str(tmp_path), global_batch_size=4094)


def test_without_a_global_batch_size_nothing_changes(tmp_path):
    args = IConETrainingArguments(str(tmp_path), per_device_train_batch_size=64, per_device_chunk_size=16)
    assert (args.per_device_train_batch_size, args.global_batch_size) == (64, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0 must be 1 or more"),
        ({"per_device_chunk_size": -1}, "per_device_chunk_size=-1 must be 1 or more"),
        ({"per_device_chunk_size": 8, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 would add up"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 would add up"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        IConETrainingArguments(str(tmp_path), **arguments)
