"""`python -m trm_jax.pretrained`: the table, the report, the conversion, the exit codes."""

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.oracles.random_variables import random_like, random_variables
from tests.pretrained import archives, checkpoints
from trm_jax.models.clip import towers
from trm_jax.pretrained import architectures, command, convert, identify, registry
from trm_jax.types import UserError

CONFIGS = checkpoints.CONFIGS


def _run(capsys, *arguments):
    code = command.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _rows(report):
    """{label: value} of a report; the path is under ""."""
    path, *lines = report.splitlines()
    return {"": path} | {line[:15].strip(): line[15:].strip() for line in lines}


def test_the_table_lists_every_architecture_once_in_aligned_columns(capsys):
    code, out, _ = _run(capsys)
    assert code == 0
    header, *lines, last = out.splitlines()
    assert last == (
        "with -gelu at its end, as in ViT-B/32-gelu, a name means the same towers with GELU in "
        "place of QuickGELU"
    )
    assert [line.split()[0] for line in lines] == list(architectures.ARCHITECTURES)
    where = header.index("hub repository")
    assert all(line[where - 2 : where] == "  " and line[where] in "tn" for line in lines)
    row = "RN101         119,688,033    512    224  RN101.pt           timm/resnet101_clip.openai"
    assert row in lines
    assert "623,258,305   1024    448  RN50x64.pt" in out


@pytest.mark.parametrize(
    "kind, form, said",
    [
        *((kind, "openclip", "safetensors, OpenCLIP's names") for kind in CONFIGS),
        *((kind, "openai", "TorchScript archive, OpenCLIP's names") for kind in CONFIGS),
        *((kind, "state dict", "torch state dict, OpenCLIP's names") for kind in CONFIGS),
        ("vit", "transformers", "safetensors, transformers' names"),  # it has no ResNet
    ],
)
def test_the_report_of_every_format(tmp_path, capsys, kind, form, said):
    paths = checkpoints.write_all(tmp_path, kind)
    code, out, err = _run(capsys, paths[form])
    assert (code, err) == (0, "")
    rows = _rows(out)
    count = towers.count_parameters(towers.abstract_variables(CONFIGS[kind])["params"])
    assert rows[""] == str(paths[form])
    assert rows["format"] == said
    assert rows["sha256"] == hashlib.sha256(paths[form].read_bytes()).hexdigest()
    assert rows["published"].startswith("no")
    assert rows["parameters"] == str(f"{count:,}")
    title = {"vit": "a CLIP ViT", "resnet": "a CLIP ResNet"}[kind]
    assert rows["architecture"].startswith(f"{title}, none of the named ones: embed_dim 6, image.")
    assert [rows[key] for key in ("missing", "left over", "other shape")] == ["nothing"] * 3
    if form == "openai":
        assert rows["dtype"].startswith("float16") and rows["dtype"].endswith("int64 (3)")


def test_what_is_missing_and_left_over_is_said(tmp_path, capsys):
    state = checkpoints.half_state("vit") | {"extra.weight": np.float16([1])}
    del state["visual.transformer.resblocks.0.ln_1.bias"]
    state["visual.ln_post.bias"] = np.zeros(9, np.float16)
    path = archives.write_state_dict(tmp_path / "a.pt", state)
    code, out, _ = _run(capsys, path)
    rows = _rows(out)
    assert code == 0
    assert rows["missing"] == "visual.transformer.resblocks.0.ln_1.bias"
    assert rows["left over"] == "extra.weight"
    assert rows["other shape"] == "visual.ln_post.bias"
    code, out, err = _run(capsys, path, f"--out={tmp_path / 'b.safetensors'}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "missing visual.transformer.resblocks.0.ln_1.bias, left over extra.weight" in err


def _write_zeros(path, shapes):
    """Zeros of real shapes in a file that says so without holding them."""
    header = {name: {"dtype": "F16", "shape": shape} for name, shape in shapes.items()}
    end = 0
    for entry in header.values():
        start, end = end, end + 2 * int(np.prod(entry["shape"]))
        entry["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_named_architecture_and_the_nearest_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.files, "sha256", lambda path: "0" * 64)  # of 300 MB of zeros
    shapes = identify.shapes_of("ViT-B/32")
    rows = _rows(_run(capsys, _write_zeros(tmp_path / "ViT-B-32.pt", shapes))[1])
    assert rows["architecture"] == "ViT-B/32"
    assert rows["parameters"] == "151,277,313"
    assert rows["published"] == "no: it is not the ViT-B-32.pt that OpenAI published"
    lost = {"token_embedding.weight", "visual.transformer.resblocks.11.ln_1.bias"}
    kept = {name: shape for name, shape in shapes.items() if name not in lost}
    rows = _rows(_run(capsys, _write_zeros(tmp_path / "part.safetensors", kept))[1])
    assert rows["architecture"] == (
        "none: these are no towers of CLIP: token_embedding.weight is missing"
    )
    assert rows["nearest"] == "ViT-B/32"
    assert rows["missing"] == ", ".join(sorted(lost))
    assert rows["left over"] == rows["other shape"] == "nothing"
    monkeypatch.setattr(
        command.files, "sha256", lambda path: architectures.PUBLISHED["ViT-B/32"].openai_sha256
    )
    rows = _rows(_run(capsys, tmp_path / "ViT-B-32.pt")[1])
    assert rows["published"] == "yes, OpenAI's ViT-B-32.pt"


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_is_told_from_its_shapes(name):
    config = identify.infer(identify.shapes_of(name))
    assert config == registry.architecture(name)
    assert identify.named(config) == name


@pytest.mark.parametrize("kind", CONFIGS)
def test_unnamed_architectures_are_told_from_their_shapes(kind):
    shapes = convert.openclip_shapes(CONFIGS[kind])
    assert identify.infer(shapes) == towers.validate(CONFIGS[kind])
    assert identify.named(identify.infer(shapes)) is None
    assert identify.nearest(shapes) is None
    assert not any(identify.compare(shapes, shapes))


@pytest.mark.parametrize("name", ["visual.conv1.weight", "positional_embedding"])
def test_shapes_of_something_else_are_refused(name):
    shapes = convert.openclip_shapes(CONFIGS["vit"])
    with pytest.raises(UserError, match=f"no towers of CLIP: {name} is missing"):
        identify.infer({key: shape for key, shape in shapes.items() if key != name})
    with pytest.raises(UserError, match="a tensor has other axes"):
        identify.infer(shapes | {"visual.positional_embedding": (6, 8)})


@pytest.mark.parametrize("kind", CONFIGS)
def test_conversion_to_openclip_names_keeps_every_number(tmp_path, capsys, kind):
    paths = checkpoints.write_all(tmp_path, kind)
    expected = {name: array.astype("f4") for name, array in checkpoints.half_state(kind).items()}
    for form, path in paths.items():
        out = tmp_path / f"out {form}.safetensors"
        code, printed, _ = _run(capsys, path, "--out", out)
        assert code == 0
        assert printed.startswith(f"{out}: a CLIP ") and "float32, openclip names" in printed
        stored = safetensors.numpy.load_file(out)
        assert stored.keys() == expected.keys()
        for name, array in expected.items():
            assert stored[name].dtype == np.float32
            np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_conversion_from_and_to_our_own_format(tmp_path, capsys):
    config = {**CONFIGS["resnet"], "text": checkpoints.TEXT | {"heads": 2}}
    ours, out, back = (tmp_path / f"{name}.safetensors" for name in ("ours", "out", "back"))
    variables = random_variables(config)
    tokenizer = {"kind": "words", "words": ["a"]}
    registry.save(ours, variables, config=config, tokenizer=tokenizer, provenance={"mAP": 1.5})
    rows = _rows(_run(capsys, ours)[1])
    assert rows["format"] == "safetensors, trm_jax's names"
    assert "text.heads 2" in rows["architecture"]
    assert _run(capsys, ours, f"--out={out}", "--format=openclip")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, registry.load(out, config), variables)
    assert _run(capsys, ours, f"--out={back}", "--format=trm_jax")[0] == 0
    assert registry.read_metadata(back) == registry.read_metadata(ours)
    jax.tree.map(np.testing.assert_array_equal, registry.load(back, config), variables)
    code, _, err = _run(capsys, out, f"--out={back}", "--format=trm_jax")
    assert code == 2 and "has a vocabulary of 9 words, not CLIP's 49408" in err


def test_clips_vocabulary_brings_clips_tokenizer_and_the_assumptions_are_said(tmp_path, capsys):
    text = checkpoints.TEXT | {"vocab_size": 49408, "eos_id": 49407}
    config = CONFIGS["vit"] | {"text": text}
    variables = random_like(towers.abstract_variables(config))
    path, out = tmp_path / "clip.safetensors", tmp_path / "out.safetensors"
    registry.save_openclip(path, variables)
    code, printed, _ = _run(capsys, path, f"--out={out}", "--format=trm_jax")
    assert code == 0
    assert "trm_jax names; assumed: QuickGELU, heads of 64 channels" in printed
    stored = registry.read_metadata(out)
    assert stored["config"] == towers.validate(config)
    assert stored["tokenizer"] == {"kind": "clip"}
    assert stored["provenance"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_several_files_are_all_looked_at(tmp_path, capsys):
    paths = checkpoints.write_all(tmp_path, "vit")
    code, out, err = _run(capsys, tmp_path / "none", paths["openai"], tmp_path, "glyphs")
    assert code == 2
    assert err == f"error: {tmp_path / 'none'} does not exist; give the path of a file of weights\n"
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        str(paths["openai"]),
        str(paths["openclip"]),
        str(registry.PACKAGED["glyphs"]),
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--unknown"], "unrecognized arguments: --unknown; --help shows the usage"),
        (["--form=openclip"], "unrecognized arguments: --form=openclip"),
        (["--format=onnx"], "invalid choice: 'onnx'"),
        (["--out"], "--out: expected one argument"),
        (["--out=a.safetensors"], "--out converts one FILE; 0 are given"),
        (["a", "b", "--out=a.safetensors"], "--out converts one FILE; 2 are given"),
        (["glyphs", "--out=a.pt"], "--out=a.pt must end in .safetensors"),
        (["glyphs", "--out=/proc/none/a.safetensors"], "cannot be written"),
    ],
)
def test_wrong_usage_makes_one_line(capsys, arguments, said):
    code, out, err = _run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and said in err


def test_the_module_runs_with_the_right_exit_codes(tmp_path):
    def run(*arguments):
        command_line = [sys.executable, "-m", "trm_jax.pretrained", *map(str, arguments)]
        return subprocess.run(command_line, capture_output=True, text=True)

    helped = run("--help")
    assert helped.returncode == 0 and "--out F.safetensors" in helped.stdout
    page = tmp_path / "RN50.pt"
    page.write_text("<html></html>")
    refused = run(page)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"error: {page} is a web page, perhaps of a failed download; " + (
        "fetch it again\n"
    )
