"""Nothing in other people's zoos, architecture files and run directories runs, writes, or moves a cursor."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from support import tiny_zoo
from support.wording import refused, said
from tqdm import tqdm

from rft_fast import figures, results, sweep
from rft_fast.clip import allowed, architectures, tokenizers
from rft_fast.common import disk, terminal, words
from rft_fast.config import request
from rft_fast.config.settings import Computed, builder
from rft_fast.finetune import Request, output
from rft_fast.finetune.settings import Setting
from rft_fast.finetune.zoo_folder import refuse_links
from rft_fast.run import identity
from rft_fast.settings import Along, Layers
from rft_fast.studies.rows import COLUMNS

# --- files --------------------------------------------------------------------------------------------

WRITTEN = "rows.sqlite rows.sqlite-wal rows.sqlite-shm rows.sqlite-journal .lock run.log".split()
REPLACED = "rows.csv config.json cost.csv correlation.csv figures/interpolation.png figures/prune.png".split()
PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda name, victim: name.symlink_to(victim),
    "to nothing": lambda name, victim: name.symlink_to(victim.with_name("new")),
    "FIFO": lambda name, _: os.mkfifo(name),
    "hard link": lambda name, victim: name.hardlink_to(victim),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", [*WRITTEN, *REPLACED])
def test_nothing_is_written_through_what_lies_in_a_run(tmp_path: Path, name: str, planted: str) -> None:
    if planted == "hard link" and name in REPLACED:
        pytest.skip("a new file takes its place, so that the other name keeps the old one")
    with results.Run(tmp_path / "run", {"a": 1}):
        pass
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    file = tmp_path / "run" / name
    file.unlink(missing_ok=True)
    PLANTED[planted](file, victim)
    there = {path.name for path in tmp_path.rglob("*")}
    for call in (
        lambda: results.check(tmp_path / "run"),
        lambda: results.Run(tmp_path / "run", {"a": 1}),
        lambda: results.Run(tmp_path / "run", {"a": 2}, overwrite=True),
    ):
        with refused(ValueError, Path(name).name):
            call()
    assert victim.read_bytes() == b"precious" and {path.name for path in tmp_path.rglob("*")} == there


def test_figures_that_are_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").symlink_to(tmp_path / "elsewhere")
    with refused(ValueError):
        results.check(tmp_path / "run")


def test_parts_cannot_be_foreseen(tmp_path: Path) -> None:
    file, seen = tmp_path / "rows.csv", set()
    for number in range(20):
        with disk.replacing(file) as part:
            assert part.parent == tmp_path and not part.is_symlink() and part.read_bytes() == b""
            seen.add(part.name)
            part.write_text(str(number))
    assert len(seen) == 20 and file.read_text() == "19" and os.listdir(tmp_path) == ["rows.csv"]


def test_parts_that_are_left_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    file, victim = tmp_path / "a", tmp_path / "victim"
    victim.write_text("precious")
    left, link, other = (tmp_path / f".a.{c * 16}.part" for c in "123")
    left.touch()
    link.symlink_to(victim)
    other = tmp_path / ".ab.3333333333333333.part"
    other.touch()
    with disk.replacing(file) as outer:
        outer.write_text("outer")
        disk.replace(file, b"inner")
        assert outer.exists() and file.read_text() == "inner"
    assert file.read_text() == "outer" and victim.read_text() == "precious"
    assert not left.exists() and link.is_symlink() and other.exists()


@pytest.mark.parametrize("planted", ["symbolic link", "to nothing", "FIFO"])
def test_locks_do_not_follow_links(tmp_path: Path, planted: str) -> None:
    PLANTED[planted](tmp_path / ".lock", tmp_path / "victim")
    with refused(OSError), disk.locked(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "victim").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [".lock", ".lr0.01.lock", "lr0.01.resume", "lr0.01.csv", "zoo.toml"])
def test_fine_tuning_writes_through_no_link(tmp_path: Path, name: str) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    (out / name).symlink_to(victim)
    asked = Request("none", "none", tmp_path, out, {"lr0.01": Setting()})
    with refused(ValueError):
        refuse_links(asked)
    assert victim.read_text() == "precious"


class _Runs:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return (Path.touch, (self.file,))


def test_a_state_of_fine_tuning_runs_nothing(tmp_path: Path) -> None:
    for number, save in enumerate((torch.save, lambda what, file: file.write_bytes(pickle.dumps(what)))):
        file = tmp_path / f"{number}.resume"
        save({"configuration": _Runs(tmp_path / "RAN")}, file)
        with refused(ValueError):
            output.FileKeeper(file, {}).load()
    assert not (tmp_path / "RAN").exists()
    os.mkfifo(tmp_path / "model.safetensors")
    with refused(ValueError):
        output.configuration_of(tmp_path / "model.safetensors")


# --- the terminal -------------------------------------------------------------------------------------

EVIL = [
    *(chr(c) for c in range(0x20)),
    *(chr(c) for c in range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\udc80\udcff",
    *"\u00ad\u200b\u2060\ufeff",  # two names that differ by these look like one
]
FINE = "abc ÅÉ 漢字 \u00a0 👩\u200d🔬 ~ \\x1b $x$ <b> — e\u0301"


def test_visible_text() -> None:
    for one in EVIL:
        text = words.visible(f"a{one}b")
        assert text.isprintable() and text[0] == "a" and text[-1] == "b" and len(text) > 3
        assert json.loads(f'"{words.visible(f"a{one}b", lines=True)}"' if one not in "\n\t" else '"x"')
    assert words.visible(FINE) == words.visible(FINE, lines=True) == FINE
    assert words.visible("a\nb\tc", lines=True) == "a\nb\tc"
    assert words.some(["a\nb", "c"]) == "a\\nb, c"
    assert words.message(ValueError("a\nerror: b\n  c")) == "a\\nerror: b\n  c"


@terminal.escaped
def _speak(text: str) -> None:
    print(text)
    print("error:", text, file=sys.stderr)
    tqdm.write(f"note: {text}")


def test_streams_escape_whoever_writes(capsys: pytest.CaptureFixture[str]) -> None:
    for one in EVIL:
        _speak(f"a{one}b")
    out, err = capsys.readouterr()
    assert not set(EVIL) - {"\n", "\t"} & set(out + err), "these went through"
    _speak(FINE)
    out, err = capsys.readouterr()
    assert out == f"{FINE}\nnote: {FINE}\n" and err.startswith(f"error: {FINE}\n")
    assert not isinstance(sys.stdout, terminal.Escaping) and not isinstance(sys.stderr, terminal.Escaping)


def test_progress_bars_draw_as_without() -> None:
    def drawn(stream: io.StringIO, file: object) -> str:
        # Without speed and time: how many digits they have decides how long the bar is.
        look: Any = {"file": file, "mininterval": 0, "leave": False, "ncols": 60}
        look["bar_format"] = "{desc} {bar} {n_fmt}"
        with tqdm(total=3, desc="a", **look) as outer:
            for _ in range(3):
                for _ in tqdm(range(2), desc="b", **look):
                    pass
                tqdm.write("a line", file=file)
                outer.update()
        return stream.getvalue()

    plain, stream = io.StringIO(), io.StringIO()
    assert drawn(stream, terminal.Escaping(stream)) == drawn(plain, plain) and "\x1b[A" in plain.getvalue()


# --- pictures -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    names = ["$", "$\\frac{$", "a\x1b[31m\nb", "\u202egnp", "漢字", "</script><img onerror=x>"]
    rows = [
        {"study": "interpolation", "model": name, "dataset": f"{name} data", "ood": True, "alpha": alpha}
        | {"loss": 1.0 + alpha, "loss_se": 0.1, "accuracy": 0.5, "accuracy_se": 0.1, "samples": 10}
        | {"loss_change_se": 0.1, "accuracy_change_se": 0.1}
        for name in names
        for alpha in (0.0, 1.0)
    ]
    table = pd.DataFrame([{c: row.get(c) for c in COLUMNS} for row in rows]).astype(
        {c: k for c, k in COLUMNS.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.interpolation(table, tmp_path / "a.png")
    texts = " ".join(t.get_text() for legend in figure.legends for t in legend.get_texts())
    assert "\\u001b" in texts and r"\$" in texts and not {"\x1b", "\u202e"} & set(texts)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(os.listdir(tmp_path)) == 1


# --- what a file may say ------------------------------------------------------------------------------

VISION = {"image_size": 8, "patch_size": 4, "width": 8, "head_width": 4, "layers": 1, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}


def architecture(folder: Path, vision: object = None, text: object = None, **model: object) -> Path:
    file = folder / "model.json"
    cfg = {"embed_dim": 6, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}  # type: ignore[operator]
    file.write_text(json.dumps({"model_cfg": cfg | model}))
    return file


def test_every_architecture_of_open_clip_is_on_the_list() -> None:
    for name in open_clip.list_models():
        allowed.check(open_clip.get_model_config(name), name)


@pytest.mark.parametrize(
    ("vision", "text", "model"),
    [
        *(
            ({"timm_model_name": name}, None, {})
            for name in (
                *("hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp/evil", "local-dir:.", "timm/x"),
                *("../evil", "/tmp/evil", "no_such_model", "resnet18\n", ["resnet18"], 3, "hf-hub:", "x:y"),
            )
        ),
        *(
            ({name: value}, None, {})
            for name in ("act_kwargs", "norm_kwargs")
            for value in ({"device": "cuda"}, {"cls": "os.system"}, {"eps": "1"}, {"approximate": ["x"]}, "x")
        ),
        *(
            (None, {"tokenizer_kwargs": {name: value}}, {})
            for name, value in {
                **dict.fromkeys(("trust_remote_code", "use_auth_token", "force_download", "proxies"), True),
                **dict.fromkeys(
                    ("bpe_path", "cache_dir", "vocab_file", "gguf_file", "revision"), "/etc/passwd"
                ),
                **{
                    "tokenizer_file": "x",
                    "config": {},
                    "clean": "__import__",
                    "language": "a b",
                    "token": "x",
                },
            }.items()
        ),
        *((None, {name: "x y"}, {}) for name in ("pool_type", "proj_type", "tokenizer_mode", "block_type")),
        *((None, {name: 1}, {}) for name in ("hf_tokenizer_name", "hf_model_name")),
        *(({name: {"a": 1}}, None, {}) for name in ("layers", "width", "image_size", "timm_pool")),
        *(({name: -1}, None, {}) for name in ("layers", "width", "patch_size", "mlp_ratio", "ls_init_value")),
        ({"norm_kwargs": {"eps": -1.0}}, {"heads": -2}, {"embed_dim": -6}),
        ({"weights": "evil.pt"}, None, {}),
        (None, {"pretrained": "hf-hub:evil"}, {}),
        (None, None, {"pretrained": "openai"}),
        (None, None, {"quick_gelu": "no"}),
        (None, None, {"text_cfg": "evil"}),
        (None, None, {"multimodal_cfg": [1]}),
    ],
)
def test_options_of_other_libraries_are_refused(
    tmp_path: Path, vision: object, text: object, model: dict[str, object]
) -> None:
    with refused(ValueError):
        architectures.config(architecture(tmp_path, vision, text, **model))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What would be handed to transformers, which has nothing in its cache."""
    asked: list[dict[str, object]] = []

    def load(name: str, context: int, **options: object) -> str:
        asked.append({"name": name, **options})
        if options["local_files_only"] and not Path(name).is_dir():
            raise OSError("not in the cache")
        return "a tokenizer"

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", load)
    return asked


def test_tokenizers_lie_beside_their_file(tmp_path: Path, loaded: list[dict[str, object]]) -> None:
    zoo, outside = tmp_path / "zoo", tmp_path / "outside"
    for folder in (zoo / "tok", outside, zoo / "auto", zoo / "linked", zoo / "fifo"):
        folder.mkdir(parents=True)
        (folder / "tokenizer_config.json").write_text("{}")
    (zoo / "link").symlink_to(outside)
    (zoo / "linked" / "tokenizer.json").symlink_to(outside / "tokenizer_config.json")
    os.mkfifo(zoo / "fifo" / "tokenizer.json")
    (zoo / "auto" / "config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    for name in ("tok", "./tok", "tok/../tok"):
        assert tokenizers.tokenizer(architecture(zoo, text={"hf_tokenizer_name": name})) == "a tokenizer"
        assert loaded[-1]["name"] == str(zoo / "tok") and loaded[-1]["trust_remote_code"] is False
    count = len(loaded)
    for name in (
        *(
            "../outside",
            str(outside),
            "link",
            "linked",
            "auto",
            "fifo",
            ".",
            "",
            "tok/../../outside",
            "/",
            "~",
        ),
        *("http://evil", "hf-hub:evil/x", "evil/x/y", "a b", "-x", "x\n", "file:///etc"),
    ):
        file = architecture(zoo, text={"hf_tokenizer_name": name or "./"})
        with refused(ValueError):
            tokenizers.tokenizer(file)
    assert len(loaded) == count


def test_a_file_downloads_no_tokenizer(
    tmp_path: Path, loaded: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = architecture(tmp_path, text={"hf_tokenizer_name": "org/name"})
    for network in (None, False):
        with refused(tokenizers.NotHere, "org/name"):
            tokenizers.tokenizer(file, network)
    assert all(asked["local_files_only"] for asked in loaded)
    assert tokenizers.tokenizer(file, network=True) == "a tokenizer"
    assert tokenizers.tokenizer("ViT-B-16-SigLIP") == "a tokenizer"  # open_clip's own word for it
    with pytest.raises(tokenizers.NotHere):
        tokenizers.tokenizer("ViT-B-16-SigLIP", network=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)  # transformers would take it for the repository
    with refused(ValueError):
        tokenizers.tokenizer(architecture(tmp_path / "arch", text={"hf_tokenizer_name": "org/name"}))


# --- zoo files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def zoo_file(folder: Path, options: str = "seed = 0", **entries: str) -> Path:
    entries = {"arch": "tiny.json", "zeroshot": "zeroshot.safetensors"} | entries
    lines = ['name = "z"', *(f"{name} = {json.dumps(value)}" for name, value in entries.items())]
    lines += ["[finetuned]", 'a = "a.safetensors"', "[data.near]", 'path = "near"', "[options]", options]
    file = folder / "zoo.toml"
    file.write_text("\n".join(lines))
    return file


def test_options_say_what_is_measured_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = builder()
    every = {name[2:] for name in options.strings}
    own = {name for name, entry in options.entries.items() if entry.option.own or entry.group.own}
    may = options.entries.keys() - own
    assert {"samples", "rhos", "precision", "seed", "layers"} < may < every
    never = every - may
    assert {
        *"out overwrite workers cache no-cache track device quiet json memory-limit fetch plan".split()
    } < never
    words = [f'{name} = "{tmp_path / "planted"}"' for name in sorted(never)]
    words += [f"{name} = true" for name in sorted(never)]
    words += ['"out=planted" = true', '"" = true', "help = true"]
    for line in words:
        tiny_zoo.sweep_refused([str(zoo_file(folder, line))])
    asked = request.read([str(zoo_file(folder, 'layers = ["--out", "planted"]'))])  # names, and no words
    assert asked.of(Layers).layers == ("--out", "planted") and asked.out.parent.name == "rft-runs"
    assert not list(tmp_path.iterdir())
    asked = request.read([str(zoo_file(folder, 'samples = 5\nalphas = "0:1:3"\nbatch-size = 7'))])
    assert (asked.of(Along).samples, asked.of(Along).alphas) == (5, (0, 0.5, 1))
    assert asked.of(Computed).batch_size == 7


@pytest.mark.parametrize("size", ["9", -1, 0, True, 1e9, [1], 2**70])
def test_sizes_of_a_run_that_is_resumed_are_numbers(
    folder: Path, tmp_path: Path, size: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(sizes: dict[str, object]) -> dict[str, Any]:
        return {"settings": {"computed": sizes}}

    asked = request.read([str(zoo_file(folder)), "--out", str(tmp_path)])
    monkeypatch.setattr(results, "check", lambda *_: None)
    for name in ("batch_size", "memory_limit"):
        there = {"batch_size": None, "memory_limit": 2**30}
        monkeypatch.setattr(results, "recorded", lambda _, there=there, name=name: of(there | {name: size}))
        with refused(ValueError, name):
            identity.resumed(asked)
        monkeypatch.setattr(results, "recorded", lambda _, there=there: of(there))
        assert identity.resumed(asked).of(Computed).memory_limit == 2**30


# --- the hub ------------------------------------------------------------------------------------------


class Hub:
    """Hugging Face, and a local cache of it: repository -> its commits, each with files."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.commits, self.downloads = cache, ["a" * 40], []
        self.files: dict[str, Path] = {}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def download(self, repository: str, name: str, revision: str | None = None) -> str:
        commit = revision if revision in self.commits else self.commits[-1]
        self.downloads.append(name)
        if name not in self.files:
            error = EntryNotFoundError.__new__(EntryNotFoundError)
            Exception.__init__(error, "not there")
            raise error
        base = self.cache / f"models--{repository.replace('/', '--')}"
        there = base / "snapshots" / commit / name
        there.parent.mkdir(parents=True, exist_ok=True)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(self.commits[-1])
        there.write_bytes(self.files[name].read_bytes())
        return str(there)


@pytest.mark.slow
def test_repositories_are_fetched_when_the_user_says_so_and_pinned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    hub.files = {
        "open_clip_config.json": folder / "tiny.json",
        "model.safetensors": folder / "zeroshot.safetensors",
    }
    zoo = str(zoo_file(folder, arch="hf-hub:org/name", zeroshot="hf-hub:org/name@main"))
    words = ["interpolation", "--alphas", "0", "1", "--device", "cpu", "--no-cache", "--quiet"]
    # A zoo file starts no download, nor does a plan, whoever names the source.
    tiny_zoo.sweep_refused([zoo, *words, "--out", "run"], "--fetch")
    hub_named = ["--arch", "hf-hub:org/name", "--zeroshot", "hf-hub:org/name"]
    named = [*tiny_zoo.own_models(folder, "a"), *hub_named]
    for arguments in ([zoo], named):
        assert sweep.main([*arguments, *words[1:-1], "--plan"]) == 0
        said(capsys.readouterr().out, "hf-hub:org/name")
    assert not hub.downloads and not (tmp_path / "hub").exists()
    # --fetch does, and the command line by naming it.
    assert sweep.main([zoo, *words, "--out", "run", "--fetch"]) == 0
    assert {*hub.downloads} >= {*hub.files}
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    pinned = f"hf-hub:org/name@{'a' * 40}"
    assert told["repository of the architecture"]["path"] == told["zeroshot"]["path"] == pinned
    assert request.read([*words, *named]).zoo.arch == pinned
    # What is cached is used as it is, without a word to the hub, and a run is resumed with it.
    hub.commits.append("b" * 40)
    hub.downloads.clear()
    hub.files = {}
    before = (tmp_path / "run" / "rows.csv").read_bytes()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _cached_alone)
    assert sweep.main([zoo, *words, "--out", "run"]) == 0
    assert (tmp_path / "run" / "rows.csv").read_bytes() == before and not hub.downloads


def _cached_alone(repository: str, name: str, revision: str | None = None) -> str:
    """As huggingface_hub does for a commit that it has: without the network."""
    assert revision == "a" * 40, "the hub was asked"
    found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    "source",
    [
        *(
            "hf-hub:../../evil",
            "hf-hub:org/..",
            "hf-hub:/etc/x",
            "hf-hub:org/name@../../x",
            "hf-hub:org/name@/x",
        ),
        *(
            "hf-hub:org/name@",
            "hf-hub:org/name/x",
            "hf-hub:org",
            "hf-hub:",
            "hf-hub:o/n@a/../b",
            "hf-hub:.x/n",
        ),
    ],
)
def test_repositories_stay_in_their_cache(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("was asked"))
    for call in (
        lambda: architectures.config(source),
        lambda: request.read([str(zoo_file(folder, arch=source))]),
        lambda: request.read([str(zoo_file(folder, zeroshot=source)), "--fetch"]),
    ):
        with refused(ValueError, "hf-hub:org/name"):
            call()


def test_a_plan_says_that_a_tokenizer_would_be_downloaded(
    tmp_path: Path, loaded: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_zoo.make(tmp_path)
    text = TEXT | {"vocab_size": 64}
    for name in ("zeroshot", "a"):
        tiny_zoo.save(open_clip.CLIP(6, VISION, text).state_dict(), tmp_path / f"{name}.safetensors")
    architecture(tmp_path, text={**text, "hf_tokenizer_name": "org/name"})
    (tmp_path / "names.txt").write_text("0\n1\n2")
    entries = {"arch": "model.json", "class-names": "names.txt", "templates": "photo"}
    zoo = str(zoo_file(tmp_path, **entries))
    assert sweep.main([zoo, "interpolation", "--plan", "--device", "cpu"]) == 0
    said(capsys.readouterr().out, "org/name")
    tiny_zoo.sweep_refused([zoo, "interpolation", "--device", "cpu"], "org/name")
    assert loaded and all(asked["local_files_only"] for asked in loaded)
