"""Patch relevance against the paper's matrices, and on models whose relevant patch is known."""
import pytest
import torch
import transformers

from model.ast import AST, ASTConfig
from model.pretrained import load_pretrained
from model.relevance import patch_relevance


def test_agrees_with_the_papers_equations_on_the_hubs_attentions(tmp_path):
    """Equations 5 and 6 with whole (N, N) matrices, on the attentions of another implementation.

    The hub's model computes all tokens of the last block, too, and R is multiplied in block order.
    """
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
        num_labels=5, max_length=176, layer_norm_eps=1e-6, attn_implementation="eager",
        initializer_range=0.2)
    theirs = transformers.ASTForAudioClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = AST(ASTConfig(5, dim=48, depth=3, heads=4, time_patches=17)).eval()
    load_pretrained(model, tmp_path, keep_head=True)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    theirs, model = theirs.double(), model.double()
    x, target = torch.randn(2, 128, 176).double(), torch.tensor([1, 3])
    out = theirs(x.transpose(1, 2), output_attentions=True)
    gradients = torch.autograd.grad(out.logits[[0, 1], target].sum(), out.attentions)
    R = torch.eye(206).double().expand(2, -1, -1)
    for attention, gradient in zip(out.attentions, gradients, strict=True):
        R = R + (gradient * attention).clamp(min=0).mean(dim=1) @ R
    expected = R.detach()[:, :2, 2:].mean(dim=1).view(2, 12, 17)
    largest = expected.max().item()

    relevance = patch_relevance(model, x, target)
    assert relevance.shape == (2, 12, 17) and largest > 3 * expected.mean() > 0
    torch.testing.assert_close(relevance.double(), expected, atol=1e-5 * largest, rtol=1e-4)
    alone = patch_relevance(model, x[1:], target[1:])[0]  # the batch must not matter
    torch.testing.assert_close(alone, relevance[1], atol=1e-6 * largest, rtol=1e-5)


def loudness_model():
    """An AST with uniform attention that sees only loudness and adds it to class 1."""
    model = AST(ASTConfig(2, dim=8, depth=1, heads=2, n_mels=48))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.patch_embed.weight[0] = 1 / 256
        for norm in (model.blocks[0].norm1, model.norm, model.head[0]):
            norm.weight.fill_(1)
        model.blocks[0].attn.qkv.weight[16:].copy_(torch.eye(8))
        model.blocks[0].attn.proj.weight.copy_(torch.eye(8))
        model.head[1].weight[1, 0] = 1
    return model.eval()


def test_only_the_one_loud_patch_is_relevant():
    model, row, column = loudness_model(), 2, 5
    loud = 11 * row + column
    spec = torch.zeros(1, 48, 120)
    top, left = 10 * row + 7, 10 * column + 7  # the part of the patch that no other patch covers
    spec[0, top:top + 2, left:left + 2] = 50.0
    relevance = patch_relevance(model, spec, torch.tensor([1]))[0]
    assert relevance.shape == (4, 11) and relevance[row, column] > 0
    assert relevance.flatten().count_nonzero() == 1
    with torch.no_grad():  # removing patches one by one finds the same one
        whole = model(spec)[0, 1]
        scores = []
        for removed in range(44):
            others = [patch for patch in range(44) if patch != removed]
            scores.append(model(spec, patch_ids=torch.tensor([others]))[0, 1])
    assert int(torch.stack(scores).argmin()) == loud and scores[loud] < whole - 0.1
    other_class = patch_relevance(model, spec, torch.tensor([0]))
    assert other_class.count_nonzero() == 0


def bursts(n):
    """Noise with a low burst (class 1), a high one (2) or none -> specs, labels, starts."""
    spec = 0.3 * torch.randn(n, 48, 96)
    label, start = torch.randint(3, (n,)), torch.randint(80, (n,))
    for i in label.nonzero()[:, 0]:
        top = 24 * label[i] - 16
        spec[i, top:top + 8, start[i]:start[i] + 10] += 3
    return spec, label, start


def test_removing_relevant_patches_hurts_a_trained_model_more_than_random_ones():
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, n_mels=48))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        spec, label, _ = bursts(16)
        torch.nn.functional.cross_entropy(model(spec), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    spec, label, start = bursts(60)
    spec, label, start = spec[label > 0], label[label > 0], start[label > 0]
    before = [p.clone() for p in model.parameters()]
    relevance = patch_relevance(model, spec, label)
    assert not relevance.requires_grad
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))

    def probability(patch_ids):
        with torch.no_grad():
            scores = model(spec, patch_ids=patch_ids.sort(dim=1)[0]).softmax(dim=1)
        return float(scores.gather(1, label[:, None]).mean())

    order = relevance.flatten(1).argsort(dim=1, descending=True)
    random_order = torch.rand(order.shape).argsort(dim=1)
    assert probability(order) > 0.95
    assert probability(random_order[:, 8:]) > probability(order[:, 8:]) + 0.2
    peak = 10 * relevance.amax(dim=1).argmax(dim=1)  # first frame of the most relevant column
    overlaps = (peak + 16 > start) & (peak < start + 10)
    assert overlaps.float().mean() > 0.8


def test_takes_any_length_and_ignores_drop_path():
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, drop_path=0.9)).train()
    spec, target = torch.randn(2, 128, 173), torch.tensor([0, 2])
    with torch.inference_mode(False), torch.no_grad():
        first, second = (patch_relevance(model, spec, target) for _ in range(2))
    assert model.training and torch.equal(first, second) and first.shape == (2, 12, 16)
    with pytest.raises(ValueError, match="swapped"):
        patch_relevance(model, spec.transpose(1, 2), target)
