"""The AST against the authors' (assembled from timm's parts) and the Hugging Face hub's."""
import os

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from data.audio import read
from model.ast import AST, ASTConfig, fit_grid
from model.frontend import Fbank, FrontendConfig
from model.groups import parameter_groups
from model.pretrained import AUDIOSET, WeightsError, load_pretrained


class AuthorsAST(torch.nn.Module):
    """The authors' model from timm's parts: `v` a distilled DeiT, `mlp_head` on its two tokens."""

    def __init__(self, dim, depth, heads, n_classes, columns=101):
        super().__init__()
        self.v = timm.models.deit.VisionTransformerDistilled(
            img_size=224, patch_size=16, embed_dim=dim, depth=depth, num_heads=heads, num_classes=5)
        self.v.patch_embed.proj = torch.nn.Conv2d(1, dim, 16, 10)
        self.v.pos_embed = torch.nn.Parameter(torch.randn(1, 2 + 12 * columns, dim) * 0.02)
        norm, linear = torch.nn.LayerNorm(dim), torch.nn.Linear(dim, n_classes)
        self.mlp_head = torch.nn.Sequential(norm, linear)

    def forward(self, x, positions):  # (B, n_mels, frames)
        x = self.v.patch_embed.proj(x[:, None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.v.cls_token, self.v.dist_token], 1).expand(len(x), -1, -1)
        x = torch.cat([tokens, x], 1) + positions
        x = self.v.norm(self.v.blocks(x))
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.5 / max(1, p[0].numel()) ** 0.5 + 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


def hub_model(dim, depth, heads, n_classes, frames):
    config = transformers.ASTConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * dim, num_labels=n_classes, max_length=frames, layer_norm_eps=1e-6)
    return transformers.ASTForAudioClassification(config).eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_logits_with_the_authors_pth(tmp_path, prefix):
    theirs = AuthorsAST(96, 3, 4, 7).eval()
    randomise(theirs)
    weights = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "a.pth")
    model = AST(ASTConfig(7, dim=96, depth=3, heads=4)).eval()
    report = load_pretrained(model, tmp_path / "a.pth", keep_head=True)
    assert len(report.loaded) == len(model.state_dict())
    assert not report.reinitialised and not report.fitted
    assert sorted(key.removeprefix(prefix) for key in report.unused) == [
        "v.head.bias", "v.head.weight", "v.head_dist.bias", "v.head_dist.weight"]
    x = torch.randn(2, 128, 1024)
    with torch.no_grad():
        expected = theirs(x, theirs.v.pos_embed)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frames", [173, 398, 1024, 1300])
def test_position_grid_is_fitted_as_the_authors_do(tmp_path, frames):
    theirs = AuthorsAST(96, 2, 4, 7).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    model = AST(ASTConfig(7, dim=96, depth=2, heads=4)).eval()
    load_pretrained(model, tmp_path / "a.pth", keep_head=True)
    columns = (frames - 16) // 10 + 1
    grid = theirs.v.pos_embed[:, 2:].transpose(1, 2).reshape(1, 96, 12, 101)
    if columns < 101:
        start = 50 - columns // 2
        grid = grid[:, :, :, start:start + columns]
    elif columns > 101:
        grid = torch.nn.functional.interpolate(grid, size=(12, columns), mode="bilinear")
    patches = grid.reshape(1, 96, -1).transpose(1, 2)
    positions = torch.cat([theirs.v.pos_embed[:, :2], patches], 1)
    x = torch.randn(2, 128, frames)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x, positions), atol=1e-4, rtol=1e-4)


def test_logits_with_the_hubs_safetensors(tmp_path):
    theirs = hub_model(96, 3, 4, 7, 1024)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = AST(ASTConfig(7, dim=96, depth=3, heads=4)).eval()
    report = load_pretrained(model, tmp_path, keep_head=True)
    assert len(report.loaded) == len(model.state_dict()) and not report.unused
    for module in model.modules():  # the hub has one eps for all norms, the authors have two
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    x = torch.randn(2, 128, 1024)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2)).logits
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_without_keep_head_the_head_stays_and_is_reported(tmp_path):
    theirs = AuthorsAST(96, 2, 4, 527)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    model = AST(ASTConfig(10, dim=96, depth=2, heads=4))
    head = model.head[1].weight.clone()
    report = load_pretrained(model, tmp_path / "a.pth")
    assert torch.equal(model.head[1].weight, head)
    assert sorted(report.reinitialised) == [
        "head.0.bias", "head.0.weight", "head.1.bias", "head.1.weight"]
    assert set(report.loaded) | set(report.reinitialised) == set(model.state_dict())
    assert {"head.0.weight", "head.1.bias"} <= set(report.unused)
    with pytest.raises(WeightsError, match="527"):
        load_pretrained(model, tmp_path / "a.pth", keep_head=True)


def test_imagenet_deit_is_summed_and_fitted(tmp_path):
    deit = timm.create_model("deit_tiny_distilled_patch16_224")
    randomise(deit)
    torch.save(deit.state_dict(), tmp_path / "deit.pth")
    model = AST(ASTConfig.tiny(10))
    report = load_pretrained(model, tmp_path / "deit.pth")
    assert set(report.fitted) == {"patch_embed.weight", "pos_embed"}
    kernel = deit.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.weight, kernel)
    grid = deit.pos_embed[:, 2:].transpose(1, 2).reshape(1, 192, 14, 14)
    grid = torch.nn.functional.interpolate(grid, size=(14, 101), mode="bilinear")[:, :, 1:13]
    torch.testing.assert_close(model.pos_embed[:, 2:], grid.flatten(2).transpose(1, 2))


def frontend_lines(path, frontend):
    model = AST(ASTConfig(10, dim=96, depth=2, heads=4))
    lines = load_pretrained(model, path, frontend=frontend).lines()
    return [line for line in lines if "front end" in line]


def test_another_front_end_than_the_weights_is_reported(tmp_path, monkeypatch):
    weights = AST(ASTConfig(10, dim=96, depth=2, heads=4)).state_dict()
    fbank, logmel = FrontendConfig.of("fbank"), FrontendConfig.of("logmel")
    own = {"format": "warble", "model": weights, "ema": None, "frontend": fbank.to_dict()}
    torch.save(own, tmp_path / "own.pt")
    line, = frontend_lines(tmp_path / "own.pt", logmel)
    assert "fbank, now logmel" in line and "sample_rate 16000, now 22050" in line
    line, = frontend_lines(tmp_path / "own.pt", FrontendConfig.of("fbank", fmax=7000))
    assert "fmax 8000.0, now 7000.0" in line and "sample_rate" not in line
    assert not frontend_lines(tmp_path / "own.pt", fbank)
    assert not frontend_lines(tmp_path / "own.pt", None)

    torch.save(weights, tmp_path / "plain.pth")  # nothing says which front end it was trained with
    assert not frontend_lines(tmp_path / "plain.pth", logmel)
    own["frontend"] = {"kind": torch.zeros(2), "n_mels": [1]}  # damaged
    torch.save(own, tmp_path / "damaged.pt")
    assert not frontend_lines(tmp_path / "damaged.pt", logmel)

    report = load_pretrained(AST(ASTConfig(10, dim=96, depth=2, heads=4)), tmp_path / "plain.pth")
    monkeypatch.setitem(AUDIOSET, "sha256", report.sha256)  # the AudioSet file, from any path
    line, = frontend_lines(tmp_path / "plain.pth", logmel)
    assert "fbank, now logmel" in line
    assert not frontend_lines(tmp_path / "plain.pth", fbank)


def broken(state, how):
    state = dict(state)
    if how == "missing":
        del state["v.blocks.1.mlp.fc2.bias"]
    elif how == "extra":
        state["v.blocks.1.gamma"] = torch.zeros(3)
    elif how == "shape":
        state["v.blocks.0.attn.proj.weight"] = torch.zeros(96, 95)
    elif how == "nan":
        state["v.norm.weight"] = torch.full((96,), float("nan"))
    return state


@pytest.mark.parametrize("how, named", [
    ("missing", "fc2.bias"), ("extra", "gamma"), ("shape", "attn.proj"), ("nan", "not finite")])
def test_unexpected_tensors_are_an_error_and_change_nothing(tmp_path, how, named):
    model = AST(ASTConfig(10, dim=96, depth=2, heads=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(broken(AuthorsAST(96, 2, 4, 10).state_dict(), how), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=named):
        load_pretrained(model, tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_are_not_weights_are_refused(tmp_path):
    model = AST(ASTConfig(10, dim=96, depth=2, heads=4))
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    whole = (tmp_path / "other.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    torch.save(AuthorsAST(192, 2, 4, 10).state_dict(), tmp_path / "wide.pth")
    problems = {
        "text.pth": "damaged|pickled", "pickled.pth": "never run", "list.pth": "state dict",
        "other.safetensors": "whole AST", "cut.safetensors": "damaged", "none.pth": "no such file",
        "wide.pth": "dim 192",
    }
    for name, problem in problems.items():
        with pytest.raises(WeightsError, match=problem) as caught:
            load_pretrained(model, tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_number_of_parameters_of_the_base_size():
    with torch.device("meta"):
        n = sum(p.numel() for p in AST(ASTConfig.base(10)).parameters())
    assert round(n / 1e6, 1) == 86.2


def test_swapped_axes_are_refused():
    model = AST(ASTConfig(3, dim=32, depth=1, heads=2))
    assert model(torch.randn(1, 128, 1024)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"axes are swapped"):
        model(torch.randn(1, 1024, 128))
    for shape in ((1, 64, 200), (1, 1, 128, 200), (1, 128, 15)):
        with pytest.raises(ValueError, match="AST"):
            model(torch.randn(shape))


def test_fit_grid_cuts_both_axes_around_their_centre():
    grid = torch.arange(12 * 101.0).reshape(1, 1, 12, 101)
    torch.testing.assert_close(fit_grid(grid, 4, 6), grid[:, :, 4:8, 47:53])


def test_drop_path_depends_on_the_clip_alone():
    model = AST(ASTConfig(3, dim=32, depth=4, heads=2, drop_path=0.9)).train()
    x, noise = torch.randn(4, 128, 64), torch.rand(4, 8)
    whole = model(x, noise)
    halves = torch.cat([model(x[:2], noise[:2]), model(x[2:], noise[2:])])
    torch.testing.assert_close(whole, halves)
    assert not torch.allclose(whole, model(x, torch.rand(4, 8)))
    nothing_dropped = model(x, torch.ones(4, 8))  # but the branches are scaled up
    model.config = ASTConfig(3, dim=32, depth=4, heads=2)
    assert not torch.allclose(nothing_dropped, model.eval()(x))


@pytest.mark.parametrize("draws_itself", [False, True])
def test_activation_checkpointing_changes_no_gradient(draws_itself):
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=32, depth=3, heads=2, drop_path=0.3)).train()
    x, noise = torch.randn(8, 128, 64), None if draws_itself else torch.rand(8, 6)
    gradients = []
    for model.checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(x, noise)
        torch.manual_seed(2)  # other work between the passes that draws random numbers
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n_mels, frames", [
    (128, 16), (128, 17), (128, 25), (128, 26), (128, 46), (66, 20), (36, 20)])
def test_patch_embedding_in_bf16_is_that_in_float32(n_mels, frames):
    """Also for one column of patches, up to 25 frames, which oneDNN gets wrong with AMX."""
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=48, depth=1, heads=2, n_mels=n_mels))
    x = torch.randn(4, n_mels, frames)
    results = []
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            tokens = model.embed(x)
        tokens.square().sum().backward()
        results.append((tokens.detach(), model.patch_embed.weight.grad.clone()))
    for expected, result in zip(*results, strict=True):
        assert (result - expected).norm() < 0.02 * expected.norm()


def test_only_the_patches_of_patch_ids_matter():
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2)).eval()
    x = torch.randn(2, 128, 60, requires_grad=True)
    all_patches = torch.arange(12 * 5).expand(2, -1)
    torch.testing.assert_close(model(x, patch_ids=all_patches), model(x))
    patch_ids = torch.tensor([[0, 7], [13, 59]])  # of 12 rows and 5 columns
    model(x, patch_ids=patch_ids).square().sum().backward()
    expected = torch.zeros(2, 128, 60, dtype=torch.bool)
    for clip, row, column in ((0, 0, 0), (0, 1, 2), (1, 2, 3), (1, 11, 4)):
        expected[clip, 10 * row:10 * row + 16, 10 * column:10 * column + 16] = True
    assert torch.equal(x.grad != 0, expected)


def test_returned_attention_is_that_of_the_fast_path():
    """Blocks that return their attention give the same output and gradients; rows sum to 1."""
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2)).eval()
    randomise(model)
    x = model.embed(torch.randn(2, 128, 60)).detach().requires_grad_()
    for block, n_outputs in zip(model.blocks, (62, 2), strict=True):
        fast = block(x)
        explicit, attention = block(x, return_attention=True)
        assert attention.shape == (2, 2, n_outputs, 62)
        torch.testing.assert_close(attention.sum(dim=3), torch.ones(2, 2, n_outputs))
        torch.testing.assert_close(explicit, fast)
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (fast, explicit)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_every_parameter_is_in_exactly_one_group():
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))
    groups = parameter_groups(model, 5e-5, 1e-3, 0.01)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    by_name = {group["name"]: group for group in groups}
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in by_name.items()}
    assert settings == {"backbone": (5e-5, 0.01), "backbone_no_decay": (5e-5, 0.0),
                        "head": (1e-3, 0.01), "head_no_decay": (1e-3, 0.0)}
    not_decayed = {id(p) for name in ("backbone_no_decay", "head_no_decay")
                   for p in by_name[name]["params"]}
    for name, p in model.named_parameters():
        expected = (name.endswith("bias") or "norm" in name or name.startswith("head.0")
                    or name in ("cls_token", "dist_token", "pos_embed"))
        assert (id(p) in not_decayed) == expected, name
    model.patch_embed.requires_grad_(False)
    n_grouped = sum(len(group["params"]) for group in parameter_groups(model, 1, 1, 0))
    assert n_grouped == len(grouped) - 2


def test_the_real_audioset_weights_give_the_published_logits():
    """transformers' integration test: logits[0, :3] of sample_audio.flac, from the dataset
    nielsr/audio-spectogram-transformer-checkpoint, are [-0.8760, -7.0042, -8.6602]."""
    weights, audio = os.environ.get("WARBLE_AUDIOSET"), os.environ.get("WARBLE_SAMPLE_AUDIO")
    if not weights or not audio:
        pytest.skip("set WARBLE_AUDIOSET to the hub's model.safetensors and WARBLE_SAMPLE_AUDIO "
                    "to sample_audio.flac")
    model = AST(ASTConfig.base(527)).eval()
    load_pretrained(model, weights, keep_head=True)
    spec = Fbank()(torch.from_numpy(read(audio, 16000))[None])[:, :, :1024]
    padding = Fbank.mean / (-2 * Fbank.std)  # the authors pad with zeros, then normalise
    spec = torch.nn.functional.pad(spec, (0, 1024 - spec.shape[2]), value=padding)
    expected = torch.tensor([-0.8760, -7.0042, -8.6602])
    with torch.no_grad():
        torch.testing.assert_close(model(spec)[0, :3], expected, atol=1e-4, rtol=0)
