"""Files that lie: import and export name them in one line and leave nothing behind."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file

from sample.shards import new_folder
from sample.wan_import import import_wan

TEXT = "text_encoder/model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00007.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def rewrite_header(path, change):
    """Passes the first tensor's entry to `change`, which may alter it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header[next(name for name in header if name != "__metadata__")])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def header(**changes):
    return lambda f: rewrite_header(f / TEXT, lambda entry: entry.update(changes))


def without(key):
    return lambda f: rewrite_header(f / TEXT, lambda entry: entry.pop(key))


def change_index(f, change):
    index = json.loads((f / INDEX).read_text())
    change(index["weight_map"])
    (f / INDEX).write_text(json.dumps(index))


def twice(f):
    """A tensor of one shard in another too."""
    other = f / SHARD.replace("00002", "00003")
    name, value = next(iter(load_file(f / SHARD).items()))
    save_file({**load_file(other), name: value + 1}, other)


WHOLE = "not a whole safetensors file"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header(dtype="F16"), WHOLE),
        (header(dtype="X9"), WHOLE),
        (header(shape=5), WHOLE),
        (header(data_offsets=[0]), WHOLE),
        (header(data_offsets=[-8, 8]), WHOLE),
        (header(data_offsets=[0, 4]), WHOLE),
        (without("dtype"), WHOLE),
        (without("shape"), WHOLE),
        (twice, "does not list"),
        (lambda f: change_index(f, lambda m: m.update(a=5)), "not an index of safetensors files"),
        (lambda f: (f / INDEX).write_text("null"), "not an index of safetensors files"),
        (
            lambda f: change_index(f, lambda m: m.update(odd=os.path.basename(SHARD))),
            "lists odd in diffusion_pytorch_model-00002-of-00007.safetensors, which its shards",
        ),
        (lambda f: edit(f / "transformer/config.json", attention_head_dim=None), "dim: "),
        (lambda f: edit(f / "transformer/config.json", ffn_dim=10**30), "mlp_dim: "),
        (lambda f: edit(f / "transformer/config.json", num_layers=10**9), "num_blocks: "),
        (lambda f: edit(f / "vae/config.json", base_dim=10**9), "base_dim: "),
        (lambda f: edit(f / "vae/config.json", base_dim=2**24), "conv_in.bias is (4,)"),
        (
            lambda f: edit(f / "vae/config.json", base_dim=2**24, dim_mult=[2**24] * 4),
            "no VAE can have these sizes",
        ),
        (
            lambda f: edit(
                f / "text_encoder/config.json", num_heads=2**24, d_kv=2**24, d_model=2**24
            ),
            "no text encoder can have these sizes",
        ),
        (lambda f: edit(f / "vae/config.json", dropout=5), "dropout: "),
        (lambda f: edit(f / "text_encoder/config.json", feed_forward_proj="odd"), "activation: "),
        (
            lambda f: edit(f / "text_encoder/config.json", relative_attention_max_distance=1),
            "max_distance=1; with num_buckets=32 it must be above 8",
        ),
        (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "not JSON"),
        (
            lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
            "tokenizer: names no pad_token",
        ),
    ],
)
def test_what_lies_is_not_imported(wan_folders, tmp_path, zoetrope, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folders("t2v")[0], copy)
    damage(copy)
    code, out, err = zoetrope("import", copy, tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert str(copy) in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def drop(part):
    def damage(m):
        path = next(m.glob(f"{part}*.safetensors"))
        weights = load_file(path)
        del weights[next(iter(weights))]
        save_file(weights, path)
        if (m / f"{part}.safetensors.index.json").is_file():
            index = json.loads((m / f"{part}.safetensors.index.json").read_text())
            kept = {k: v for k, v in index["weight_map"].items() if v != path.name or k in weights}
            (m / f"{part}.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))

    return damage


def settings(part, **changes):
    def damage(m):
        contents = yaml.safe_load((m / "model.yaml").read_text())
        contents[part].update(changes)
        (m / "model.yaml").write_text(yaml.safe_dump(contents))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("dit"), "dit.safetensors: does not fit its model.yaml: lacks"),
        (drop("vae"), "vae.safetensors: does not fit its model.yaml: lacks"),
        (drop("text"), "text.safetensors: does not fit its model.yaml: lacks"),
        (settings("dit", num_blocks=3), "lacks blocks.2."),
        (settings("dit", num_blocks=1), "has unknown blocks.1."),
        (settings("dit", mlp_dim=80), "expected (80,"),
        (settings("text", width=17), "does not fit its model.yaml"),
        (settings("text", activation="odd"), "activation"),
        (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer: no tokenizer in it"),
        (lambda m: (m / "text.safetensors").write_bytes(b""), WHOLE),
    ],
)
def test_half_a_model_is_not_exported(wan_folders, tmp_path, zoetrope, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folders("t2v")[1], copy)
    damage(copy)
    code, out, err = zoetrope("export", copy, tmp_path / "out", "--format", "diffusers")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fps", "nan"], "--fps nan: use a number from 0.01 to 1000"),
        (["--fps", "inf"], "--fps inf: use a number from 0.01 to 1000"),
        (["--fps", "1e-9"], "--fps 1e-09: use"),
        (["--frames", "0"], "--frames 0: use 1 or more"),
        (["--frames", "6"], "frames=6 does not fit the VAE: it needs 4*k+1; use 9 or 5"),
        (["--size", "24"], "height=24 does not fit the DiT"),
    ],
)
def test_sizes_that_cannot_be_sampled_are_not_imported(
    wan_folders, tmp_path, zoetrope, flags, message
):
    code, _, err = zoetrope("import", wan_folders("t2v")[0], tmp_path / "out", *flags)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_into_what_it_is_made_from(wan_folders, tmp_path, zoetrope):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder, source in zip((theirs, ours), wan_folders("t2v")):
        shutil.copytree(source, folder)
    (theirs / "tokenizer" / "dangling").symlink_to("nowhere")
    os.mkfifo(theirs / "tokenizer" / "pipe")
    import_wan(theirs, tmp_path / "copied")
    assert not (tmp_path / "copied" / "tokenizer" / "pipe").exists()
    for command in (
        ["import", theirs, theirs / "tokenizer" / "m"],
        ["export", ours, ours / "tokenizer" / "m", "--format", "diffusers"],
    ):
        code, _, err = zoetrope(*command)
        assert code == 2
        assert "is inside of" in err.splitlines()[-1]


def test_two_at_once_do_not_mix(tmp_path):
    """Each writes into a folder of its own; the first one to end has the name."""
    (tmp_path / "source").mkdir()
    code = (
        "import sys; from pathlib import Path; from sample.shards import new_folder\n"
        "with new_folder(Path('out'), Path('source')) as f:\n"
        "    (f / 'theirs').touch(); print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    stale = tmp_path / f".out.{socket.gethostname()}.999999999.new"
    stale.mkdir()

    def write() -> None:
        with new_folder(tmp_path / "out", tmp_path / "source") as mine:
            assert not stale.exists()  # what a kill left is swept away, what others write is not
            (mine / "mine").touch()
            other.communicate()

    with pytest.raises(FileExistsError, match="out exists"):
        write()
    assert other.returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
