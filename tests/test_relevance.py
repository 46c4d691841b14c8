"""Which patches mattered: against the hub's model with whole matrices, and where only one patch can matter."""
import pytest
import torch
import transformers

from model.ast import AST, ASTConfig
from model.pretrained import load_pretrained
from model.relevance import patch_relevance


def test_it_is_the_rollout_of_the_paper_over_the_hubs_attentions(tmp_path):
    """Equations 5 and 6 as they stand: every block's attention from another implementation, which computes all tokens of the
    last block, too, R of all tokens, multiplied in the order of the blocks."""
    torch.manual_seed(0)
    config = transformers.ASTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, num_labels=5,
                                    max_length=176, layer_norm_eps=1e-6, attn_implementation="eager", initializer_range=0.2)
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
    slopes = torch.autograd.grad(out.logits[[0, 1], target].sum(), out.attentions)
    R = torch.eye(206).double().expand(2, -1, -1)
    for attention, slope in zip(out.attentions, slopes):
        R = R + (slope * attention).clamp(min=0).mean(dim=1) @ R
    want = R.detach()[:, :2, 2:].mean(dim=1).view(2, 12, 17)
    found = patch_relevance(model, x, target)
    assert found.shape == (2, 12, 17) and want.max() > 3 * want.mean() > 0
    torch.testing.assert_close(found.double(), want, atol=1e-5 * want.max().item(), rtol=1e-4)
    alone = patch_relevance(model, x[1:], target[1:])[0]  # whatever the neighbours in the batch
    torch.testing.assert_close(alone, found[1], atol=1e-6 * want.max().item(), rtol=1e-5)


def heard_through_values():
    """An AST that sees loudness alone, attends to all tokens alike, and adds what it sees to class 1."""
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


def test_only_the_patch_that_can_matter_does():
    model, row, column = heard_through_values(), 2, 5
    spec = torch.zeros(1, 48, 120)
    spec[0, 10 * row + 7:10 * row + 9, 10 * column + 7:10 * column + 9] = 50.0  # where no other patch reaches
    relevance = patch_relevance(model, spec, torch.tensor([1]))[0]
    assert relevance.shape == (4, 11) and relevance[row, column] > 0
    assert relevance.flatten().count_nonzero() == 1
    with torch.no_grad():  # leaving patches out one by one finds the same one
        whole = model(spec)[0, 1]
        without = [model(spec, patch_ids=torch.tensor([[i for i in range(44) if i != left]]))[0, 1] for left in range(44)]
    assert int(torch.stack(without).argmin()) == 11 * row + column and without[11 * row + column] < whole - 0.1
    assert patch_relevance(model, spec, torch.tensor([0])).count_nonzero() == 0  # nothing speaks for the other class


def test_removing_what_it_names_hurts_a_trained_model_more_than_removing_other_patches():
    """A model that has learnt to tell a high burst, a low one and none."""
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, n_mels=48))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def clips(n):
        spec, label, at = 0.3 * torch.randn(n, 48, 96), torch.randint(3, (n,)), torch.randint(80, (n,))
        for i in label.nonzero()[:, 0]:
            spec[i, 24 * label[i] - 16:24 * label[i] - 8, at[i]:at[i] + 10] += 3
        return spec, label, at

    for _ in range(120):
        spec, label, _ = clips(16)
        torch.nn.functional.cross_entropy(model(spec), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    spec, label, at = clips(60)
    spec, label, at = spec[label > 0], label[label > 0], at[label > 0]
    before = [p.clone() for p in model.parameters()]
    relevance = patch_relevance(model, spec, label)
    assert not relevance.requires_grad and all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    order = relevance.flatten(1).argsort(dim=1, descending=True)
    others = torch.rand(order.shape).argsort(dim=1)

    def left(kept):
        with torch.no_grad():
            return float(model(spec, patch_ids=kept.sort(dim=1)[0]).softmax(dim=1).gather(1, label[:, None]).mean())

    assert left(order) > 0.95 and left(others[:, 8:]) > left(order[:, 8:]) + 0.2
    columns = relevance.amax(dim=1).argmax(dim=1)  # the patch column with the peak is one that holds the burst
    assert ((10 * columns + 16 > at) & (10 * columns < at + 10)).float().mean() > 0.8


def test_it_takes_any_length_and_leaves_drop_path_alone():
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, drop_path=0.9)).train()
    spec, target = torch.randn(2, 128, 173), torch.tensor([0, 2])
    with torch.inference_mode(False), torch.no_grad():
        one, other = (patch_relevance(model, spec, target) for _ in range(2))
    assert model.training and torch.equal(one, other) and one.shape == (2, 12, 16)
    with pytest.raises(ValueError, match="swapped"):
        patch_relevance(model, spec.transpose(1, 2), target)
