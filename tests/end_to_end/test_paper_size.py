"""The paper's model at its full size, with random weights: one step of each of its stages, saved and loaded."""

import json

import pytest
import torch
from tiny import WORDS, make_groups
from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, encode_groups, retrieval_metrics


@pytest.mark.slow
def test_the_papers_stages_at_the_papers_size(tmp_path):
    train, validation = make_groups(16, captions=5), make_groups(8, start=16, captions=5)
    model = IConEModel.from_encoders(
        CLIPVisionModel(CLIPVisionConfig()), BertModel(BertConfig()), num_groups=len(train)
    )
    processor = IConEProcessor(
        CLIPImageProcessorPil(), BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    )
    args = IConETrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, per_device_train_batch_size=16, report_to="none"
    )
    metrics = IConETrainer(model, args, train, validation, processor).train()
    loaded = IConEModel.from_pretrained(tmp_path)
    assert sum(p.numel() for p in loaded.parameters()) == pytest.approx(200e6, rel=0.01)  # docs/fidelity.md
    assert loaded.classifier.weight.shape == (16, 2048)
    again = retrieval_metrics(*encode_groups(loaded, IConEProcessor.from_pretrained(tmp_path), validation))
    assert again == pytest.approx(metrics["validation"], abs=1e-6)
    logs = json.loads((tmp_path / "stages/1-joint/stage.json").read_text())["log_history"]
    # An untrained model guesses: -log(1/16) in each of the four sums of both losses.
    (first,) = [entry["contrastive_loss"] for entry in logs if "contrastive_loss" in entry]
    assert first == pytest.approx(2 * torch.log(torch.tensor(16.0)).item(), abs=2.5)
