"""Other people's parts: PEFT's methods in this harness, and a backbone whose linear weights torchao holds in int8."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from nola_vision import NOLA, PEFT, PRANC, BackboneSpec, FullFinetune, LoRA, adapt, load_adapter
from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.export import write_merged
from nola_vision.models.loading import check_saved
from nola_vision.runs import store
from tiny import trained_rows

SPEC = BackboneSpec("vit_mini_patch4_32.contours")
INT8 = BackboneSpec("vit_mini_patch4_32.contours", int8=True)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])
QUICK = ["--threads=1", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false", "--data.test_limit=40"]


def trained(model: torch.nn.Module, steps: int = 8) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-3), []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("peft.VeraConfig", {"r": 8, "target_modules": ["qkv"]}),
        ("RandLoraConfig", {"r": 4, "target_modules": ["qkv"]}),
        ("peft.IA3Config", {"target_modules": ["qkv"], "feedforward_modules": []}),
    ],
)
def test_a_peft_method_trains_is_saved_and_comes_back(config: str, settings: dict, tmp_path: Path) -> None:
    model = adapt(SPEC, PEFT(config=config, settings=settings), ["a", "b"], run_seed=2)
    losses = trained(model)
    assert losses[-1] < losses[0]
    model.eval().save(tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["bn1", "bn2"]}, {"bias": "all"}])
def test_batch_norms_that_peft_trains_come_back_with_their_statistics(settings: dict, tmp_path: Path) -> None:
    spec = BackboneSpec("test_resnet.r160_in1k", base="random", img_size=32)
    method = PEFT(config="LoraConfig", settings={"r": 2, "target_modules": ["conv2"], **settings})
    model = adapt(spec, method, ["a", "b"]).train()
    trained(model)
    kept = {name for name in model.trained_tensors() if "running_" in name}
    assert kept
    model.eval().save(tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(IMAGES), model(IMAGES))
    check_saved(model, tmp_path / "a.safetensors", IMAGES)
    with torch.no_grad():
        for name, buffer in model.backbone.named_buffers():  # the statistics of a norm that is not trained
            if name.endswith("running_mean"):
                buffer.add_(0.5)
    with pytest.raises(NolaVisionError, match="does not give the trained model back .*: PEFT changes something"):
        check_saved(model, tmp_path / "a.safetensors", IMAGES)


def test_a_peft_adapter_for_other_fixed_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VeRA's shared projections are drawn by PEFT and not in the file: they must be the ones that it trained with."""
    import peft

    settings = {"r": 8, "target_modules": ["qkv"]}
    adapt(SPEC, PEFT(config="VeraConfig", settings=settings), ["a", "b"]).save(tmp_path / "a.safetensors")
    load_adapter(tmp_path / "a.safetensors")
    config = peft.VeraConfig
    monkeypatch.setattr(peft, "VeraConfig", lambda **given: config(**given, projection_prng_key=7))
    with pytest.raises(NolaVisionError, match="other weights"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_peft_method_runs_from_a_config_to_a_row(
    adapter_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {"class_path": "PEFT", "init_args": {"config": "peft.VeraConfig", "lr": 0.01,
              "settings": {"r": 8, "target_modules": ["qkv"]}}}  # fmt: skip
    Path("vera.yaml").write_text(yaml.safe_dump({"method": "vera", "methods": {"vera": method}}))
    assert main(["fit", "--config=quickstart.yaml", "--config=vera.yaml", *QUICK]) == 0
    (row,) = trained_rows("runs")
    assert row.adapter_parameters == 6 * (8 + 480) and row.other_parameters == 0 and row.test_accuracy > 0.2


def test_peft_mistakes() -> None:
    with pytest.raises(
        NolaVisionError, match=r"'peft.VerraConfig' is not a PEFT config .*: did you mean peft\.VeraConfig"
    ):
        adapt(SPEC, PEFT(config="peft.VerraConfig"), ["a", "b"])
    with pytest.raises(NolaVisionError, match="VeraConfig cannot be used"):
        adapt(SPEC, PEFT(config="VeraConfig", settings={"rr": 3}), ["a", "b"])
    with pytest.raises(NolaVisionError, match="VeraConfig cannot be used"):
        adapt(SPEC, PEFT(config="VeraConfig", settings={"target_modules": ["nothing"]}), ["a", "b"])


@pytest.mark.parametrize(
    "method", [NOLA(num_basis=40), LoRA(targets=["qv"]), PRANC(targets=["qkv"], num_basis=40)], ids=str
)
def test_an_int8_base_trains_and_predicts(method: NOLA | LoRA | PRANC, tmp_path: Path) -> None:
    model, exact = adapt(INT8, method, ["a", "b"]), create_backbone(SPEC)(IMAGES)
    features = model.backbone(IMAGES)
    assert 0 < (features - exact).abs().max() / exact.abs().max() < 0.05
    kept = model.backbone.blocks[0].attn.qkv.weight
    assert kept.qdata.dtype == torch.int8
    losses = trained(model)
    assert losses[-1] < losses[0]
    model.eval().save(tmp_path / "a.safetensors")
    again = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(again(IMAGES), model(IMAGES))

    with pytest.raises(NolaVisionError, match="int8.*dequantise"):
        model.bank.merge()
    before = model(IMAGES)
    model.bank.merge(dequantise=True)
    assert (model(IMAGES) - before).abs().max() / before.abs().max() < 1e-4
    model.bank.unmerge()
    assert model.backbone.blocks[0].attn.qkv.weight is kept and torch.equal(model(IMAGES), before)
    with pytest.raises(NolaVisionError, match="--dequantise"):
        write_merged(model, tmp_path / "m")
    write_merged(model, tmp_path / "m", dequantise=True)
    plain = timm.create_model(f"local-dir:{tmp_path}/m", pretrained=True).eval()
    assert (plain(IMAGES) - before).abs().max() < 1e-4 * before.abs().max()


def test_int8_runs_from_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--config=quickstart.yaml", f"--model.backbone.tag={INT8.tag}", "--model.backbone.int8=true", *QUICK]
    assert main(["fit", *options]) == 0 and main(["fit", *options, "--method=1nn"]) == 0
    assert min(row.test_accuracy for row in store.read_rows("runs")[0]) > 0.5
    with pytest.raises(NolaVisionError, match="float weights"):
        adapt(INT8, FullFinetune(), ["a", "b"])
