"""What each rank of test_sharded_classifier.py checks."""

import torch
import torch.distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from icone_hf import IConEModel
from icone_hf.modeling.sharded_classifier import ShardedClassifier, clip_sharded_norm, shard

DIM, ROWS = 6, 3  # of a rank
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def plain_loss(features, class_vectors, groups, logits, temperature, nested_dims=()):
    if nested_dims:
        sizes = (DIM, *nested_dims)
        cuts = ((features[:, :size], class_vectors[:, :size]) for size in sizes)
        return sum(plain_loss(*cut, groups, logits, temperature) for cut in cuts) / len(sizes)
    if logits == "cosine":
        features, class_vectors = F.normalize(features, dim=1), F.normalize(class_vectors, dim=1) / temperature
    return F.cross_entropy(features @ class_vectors.T, groups, ignore_index=-100)


def whole(num_groups, num_ranks, with_fillers):
    """What one process would have: features, class vectors, group ids."""
    groups = torch.randint(num_groups, (num_ranks * ROWS,))
    if with_fillers:
        groups[-2:] = -100
    return torch.randn(num_ranks * ROWS, DIM) * 3, torch.randn(num_groups, DIM), groups


def check_losses(rank, num_ranks):
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    for num_groups in (1, 3, 8, 11):  # fewer than ranks, even and uneven shares
        for logits, temperature, with_fillers, nested_dims in (
            ("dot", 1.0, False, ()),
            ("cosine", 0.1, False, ()),
            ("dot", 1.0, True, ()),
            ("cosine", 0.1, True, (4, 1)),
        ):
            features, class_vectors, groups = whole(num_groups, num_ranks, with_fillers)
            classifier = ShardedClassifier(num_groups, DIM)
            rows = shard(num_groups, rank, num_ranks)
            classifier.weight.data.copy_(class_vectors[rows])
            own = features[mine].clone().requires_grad_()
            loss = classifier(own, groups[mine], logits, temperature, nested_dims=nested_dims)
            loss.backward()
            features.requires_grad_()
            class_vectors.requires_grad_()
            expected = plain_loss(features, class_vectors, groups, logits, temperature, nested_dims)
            expected.backward()
            torch.testing.assert_close(loss, expected, **CLOSE)
            torch.testing.assert_close(classifier.weight.grad, class_vectors.grad[rows], **CLOSE)
            torch.testing.assert_close(own.grad / num_ranks, features.grad[mine], **CLOSE)


def check_training(rank, num_ranks):
    """An encoder under DDP, both modalities, clipping and Adam, against one process with everything."""
    mine, num_groups = slice(rank * ROWS, (rank + 1) * ROWS), 11
    encoder = torch.nn.Linear(4, DIM)
    alone = torch.nn.Linear(4, DIM)
    alone.load_state_dict(encoder.state_dict())
    class_vectors = torch.nn.Parameter(torch.randn(num_groups, DIM))
    classifier = ShardedClassifier(num_groups, DIM)
    first = [torch.zeros(DIM) for _ in range(num_ranks)]
    torch.distributed.all_gather(first, classifier.weight.data[0].clone())
    assert len({tuple(row.tolist()) for row in first}) == num_ranks  # no two ranks start from the same rows
    classifier.weight.data.copy_(class_vectors.data[classifier.rows])
    wrapped = DistributedDataParallel(encoder)
    optimizers = [torch.optim.Adam([*encoder.parameters(), *classifier.parameters()], lr=1e-2)]
    optimizers.append(torch.optim.Adam([*alone.parameters(), class_vectors], lr=1e-2))
    for _ in range(5):
        images, texts = torch.randn(2, num_ranks * ROWS, 4)
        groups = torch.randint(num_groups, (num_ranks * ROWS,))
        both = wrapped(torch.cat((images[mine], texts[mine]))).split(ROWS)
        sum(classifier(features, groups[mine]) for features in both).backward()
        sum(plain_loss(alone(inputs), class_vectors, groups, "dot", 1.0) for inputs in (images, texts)).backward()
        norm = clip_sharded_norm(encoder.parameters(), classifier, 0.5)
        expected = torch.nn.utils.clip_grad_norm_([*alone.parameters(), class_vectors], 0.5)
        assert expected > 0.5
        torch.testing.assert_close(norm, expected, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(encoder.weight, alone.weight, **CLOSE)
        torch.testing.assert_close(classifier.weight.data, class_vectors.data[classifier.rows], **CLOSE)


def check_checkpoint(rank, plain, folder, weight):
    """Reads a checkpoint that one process has saved, and saves it again from here."""
    classifier = ShardedClassifier.from_pretrained(plain)
    assert torch.equal(classifier.weight.data, weight[classifier.rows])
    model = IConEModel.from_pretrained(plain, num_groups=0)
    model.shard_classifier(classifier)
    model.save_pretrained(folder)
    model.save_pretrained(folder)  # over an older one
    assert torch.equal(ShardedClassifier.from_pretrained(folder).weight.data, weight[classifier.rows])
    cut = IConEModel.from_pretrained(plain)
    cut.shard_classifier()
    assert torch.equal(cut.classifier.weight.data, weight[classifier.rows])


def check(rank, num_ranks, meeting, plain, folder, weight):
    """All of it, in processes that are started once."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    check_losses(rank, num_ranks)
    check_training(rank, num_ranks)
    check_checkpoint(rank, plain, folder, weight)
    torch.distributed.destroy_process_group()
