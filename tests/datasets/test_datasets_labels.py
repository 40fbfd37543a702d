"""Which rows of a head the classes of a data set are: by name, by id, by place, or as told."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from support.tiny_trees import ids
from support.wording import refused

from rft_fast.datasets import Assignment, Rows, Source, assign

INFO = Path(str(resources.files("timm"))) / "data" / "_info"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def source(names: Sequence[str], each: int = 2) -> Source:
    labels = torch.arange(len(names)).repeat_interleave(each)
    return Source("folder", Path("data"), [], labels, tuple(names), lambda index: Image.new("RGB", (8, 8)))


def rows_of(found: Assignment, each: int = 2) -> list[int]:
    """The row of each class, where all are scored."""
    assert len(found.images) == len(found.labels)
    labels: list[int] = found.labels[::each].tolist()
    assert labels == found.labels[each - 1 :: each].tolist()
    return labels


def not_assigned(names: Sequence[str], rows: Rows | None, *facts: str, label_map: Any = None) -> None:
    with refused(ValueError, *facts):
        assign(source(names), rows, label_map)


def test_without_rows_a_class_is_its_place() -> None:
    found = assign(source(["b", "n01440764", "a"]), None, None)
    assert rows_of(found) == [0, 1, 2] and found.classes is None and found.groups is None
    assert found.images.tolist() == list(range(6))


def test_without_rows_ids_of_imagenet_are_its_rows() -> None:
    """As class 0 and 1 they would be scored as a tench and a goldfish."""
    found = assign(source(["n01443537", "N01498041"]), None, None)
    assert rows_of(found) == [1, 6] and found.classes is not None and found.classes.tolist() == [1, 6]
    found = assign(source(["n01443537", "n99999999"]), None, None)
    assert rows_of(found) == [0, 1] and found.classes is None


def test_classes_go_to_the_rows_of_their_names() -> None:
    names = ["Ship", "frog", "TRUCK", "dog", "horse", "deer", "cat", "bird", "auto_mobile", "air plane"]
    found = assign(source(names), Rows(10, CIFAR10), None)
    assert rows_of(found) == [8, 6, 9, 5, 7, 4, 3, 2, 1, 0]
    assert found.classes is None and found.groups is None


def test_the_names_of_imagenet_although_two_come_twice() -> None:
    names = open_clip.IMAGENET_CLASSNAMES
    assert len(set(names)) < 1000
    assert rows_of(assign(source(names), Rows(1000, tuple(names)), None)) == list(range(1000))


NFD = partial(unicodedata.normalize, "NFD")
LETTERS = tuple("abcdefghij")
SYNSETS = ids()
WORDS = dict(zip(SYNSETS, open_clip.IMAGENET_CLASSNAMES, strict=True))
LEMMAS = [
    dict(line.split("\t") for line in (INFO / "imagenet_synset_to_lemma.txt").read_text().splitlines())[wnid]
    for wnid in SYNSETS
]
# ImageNet's, as far as nobody calls two classes so.
CLEAR = [row for row, name in enumerate(open_clip.IMAGENET_CLASSNAMES) if row not in (657, 744, 836, 837)]

RENDITIONS = sorted((LEMMAS[SYNSETS.index(wnid)], SYNSETS.index(wnid)) for wnid in ids("r"))
BIRDS = range(133, -1, -1)
# As folders must be called: each name once.
EXPORTED = [
    f"{name} 2" if row in (744, 837) else name for row, name in enumerate(open_clip.IMAGENET_CLASSNAMES)
]

# Names of a data set; names of the head, or how many rows; the row of each class.
BY_EVIDENCE: list[tuple[Sequence[str], Sequence[str] | int, Sequence[int]]] = [
    (["CAFÉ", NFD("naïve"), "u\u0308ber"], ["über", NFD("Café"), "NAÏVE"], [1, 2, 0]),
    (["straße", "Ⅳ", "ﬁre"], ["fire", "STRASSE", "iv"], [1, 2, 0]),
    (["boeing 737 200", "boeing 737_2"], ["Boeing_737_2", "boeing737 200"], [1, 0]),
    (["007", "08", "9"], ["9", "8", "7"], [2, 1, 0]),
    ([str(i) for i in range(10)], CIFAR10, range(10)),
    (["10", "9", "8"], 3, [2, 1, 0]),
    (["01", "2", "003"], 3, [0, 1, 2]),
    (["\u0661", "\u0660", "\uff12"], 3, [1, 0, 2]),  # Arabic digits, and a wide one
    (CIFAR10[::-1], 10, range(9, -1, -1)),
    (["the one"], 1, [0]),
    (SYNSETS[::-1], 1000, range(999, -1, -1)),
    (SYNSETS, [WORDS[wnid] for wnid in SYNSETS], range(1000)),
    (SYNSETS[7:9], [f"a {word}" if i % 50 == 7 else word for i, word in enumerate(WORDS.values())], [7, 8]),
    ([name for name, _ in RENDITIONS], 1000, [row for _, row in RENDITIONS]),
    ([LEMMAS[row].replace(", ", ",_").replace(" ", "_") for row in BIRDS], 1000, BIRDS),
    (["n01443537_goldfish", "000 tench", "n03126707-crane", "134.crane"], 1000, [1, 0, 517, 134]),
    (["n02504458", "n02510455"], ["giant panda", "African bush elephant"], [1, 0]),
    (["African bush elephant", "giant_panda"], ["n02510455", "n02504458"], [1, 0]),
    (open_clip.IMAGENET_CLASSNAMES, 1000, range(1000)),  # as a list in the head's order
]  # fmt: skip


@pytest.mark.parametrize(("names", "head", "truth"), BY_EVIDENCE, ids=range(len(BY_EVIDENCE)))
def test_rows_are_found_by_evidence(
    names: Sequence[str], head: Sequence[str] | int, truth: Sequence[int]
) -> None:
    rows = Rows(head) if isinstance(head, int) else Rows(len(head), tuple(head))
    found = assign(source(names), rows)
    assert rows_of(found) == list(truth) and found.groups is None and found.how
    scored = None if len(truth) == rows.count else sorted(truth)
    assert (found.classes if found.classes is None else found.classes.tolist()) == scored


# Names of a data set; names of the head, or how many rows; what is said.
WITHOUT: list[tuple[Sequence[str], Sequence[str] | int, tuple[str, ...]]] = [
    (LETTERS, CIFAR10, ("none of its class", "a, b, c", "airplane, automobile", "label map", '"order"')),
    (LETTERS, 10, ("a -> 0, b -> 1", '"order"', "--class-names")),
    (STL10, 10, ("bird -> 1",)),
    (["car" if name == "automobile" else name for name in CIFAR10], CIFAR10, ("1", "10", "car")),
    (["dogs", "cat"], ["cat", "dog"], ("1", "2", "dogs")),
    (["a", "B"], ["b", "\uff21", "c"], ("2", "3")),
    (["Cat", "cat"], ["cat", "dog"], ("Cat, cat",)),
    (["dog", "CAT", "owl"], ["Cat", "cat", "dog"], ("1", "3", "owl")),
    (["Cat", "cat"], ["cat", "Cat"], ("Cat, cat",)),
    (["cat", "Cat"], ["cat", "Cat"], ()),
    (["1 1", "2"], ["11", "2"], ("1", "2",)),
    (["0", "1", "cat"], 3, ()),
    (["1", "2", "3"], ["0", "1", "2"], ("1", "3", "3")),
    (["0", "2", "3"], 3, ()),
    (ids("r"), 200, ("WordNet ids", "-> 0")),
    (SYNSETS[:10], CIFAR10, ("WordNet ids", "airplane")),
    (SYNSETS, [f"thing {i}" for i in range(1000)], ("WordNet ids", "thing 0")),
    (sorted(WORDS[SYNSETS[row]] for row in CLEAR), 1000, ("4", "ImageNet-1k")),
    (["crane", "tench", "goldfish"], 1000, ("crane (rows 134, 517)",)),
    (["tench", "Tinca tinca".replace(" ", "_"), *SYNSETS[1:120]], 1000, ("ImageNet",)),
    (["n01443537 (1)", "n01443537", "n01440764"], 1000, ("n01443537 (1)",)),
    ([*SYNSETS[:-1], "thing"], 1000, ("1", "1000", "thing")),
    (sorted(EXPORTED), 1000, ("4", "1000", "missile (rows 657, 744)", "missile 2 (rows 657, 744)")),
]  # fmt: skip


@pytest.mark.parametrize(("names", "head", "facts"), WITHOUT, ids=range(len(WITHOUT)))
def test_without_evidence_nothing_is_assigned(
    names: Sequence[str], head: Sequence[str] | int, facts: tuple[str, ...]
) -> None:
    not_assigned(names, Rows(head) if isinstance(head, int) else Rows(len(head), tuple(head)), *facts)


def test_the_order_is_taken_where_it_is_asked_for() -> None:
    for names, rows in ((LETTERS, Rows(10, CIFAR10)), (LETTERS, Rows(10)), (STL10, Rows(10))):
        assert rows_of(assign(source(names), rows, "order")) == list(range(10))
    assert rows_of(assign(source(["10", "9"]), Rows(2), "order")) == [1, 0]
    renamed = ["car" if name == "automobile" else name for name in CIFAR10]
    assert rows_of(assign(source(renamed), Rows(10, CIFAR10), "order")) == list(range(10))
    not_assigned(STL10, Rows(10, CIFAR10), label_map="order")
    not_assigned(["ab", "cd"], Rows(3), "2", "3", label_map="order")
    words = [WORDS[wnid] for wnid in SYNSETS]
    not_assigned(SYNSETS, Rows(1000, tuple(words[::-1])), label_map="order")


def test_a_head_of_imagenet_in_another_order() -> None:
    """By devkit's order, say: ids and the numbers of ImageNetV2 go to the rows that are named so."""
    turned = [WORDS[SYNSETS[row]] for row in CLEAR][::-1]
    head = Rows(len(turned), tuple(turned))
    assert rows_of(assign(source([SYNSETS[row] for row in CLEAR]), head)) == list(range(len(turned)))[::-1]
    names = [f"{wnid} {word}" for wnid, word in WORDS.items()][::-1]
    v2 = source([str(i) for i in range(1000)])
    assert (
        rows_of(assign(replace(v2, kind="imagenet-v2"), Rows(1000, tuple(names)))) == list(range(1000))[::-1]
    )
    assert rows_of(assign(v2, Rows(1000, tuple(names)))) == list(range(1000))  # any other numbers
    thing = Rows(1000, tuple(f"thing {i}" for i in range(1000)))
    objects = replace(source(["chair"]), imagenet={"chair": (423, 559)})
    with refused(ValueError):
        assign(objects, thing)
    assert assign(objects, Rows(1000, tuple(names))).labels.tolist() == [999 - 559] * 2


def test_names_in_another_order_are_not_taken_by_place() -> None:
    """STL-10 under a head of CIFAR-10: ten classes each, and only half of them at their place."""
    not_assigned(STL10, Rows(10, CIFAR10))


def test_counts_that_differ() -> None:
    not_assigned(["a", "b"], Rows(10), "2", "10")
    not_assigned(list("abc"), Rows(2, ("a", "b")), "3", "2")


def test_label_maps() -> None:
    head = Rows(6, ("cat", "dog", "big dog", "bird", "fish", "fish"))
    names = ["kitten", "puppy", "sparrow", "stone"]
    found = assign(source(names), head, {"kitten": "Cat", "puppy": ["dog", 2], "sparrow": 3, "stone": None})
    assert found.images.tolist() == list(range(6))
    assert found.labels.tolist() == [0, 0, 1, 1, 3, 3]
    assert found.classes is not None and found.classes.tolist() == [0, 1, 2, 3]
    assert found.groups is not None and found.groups.tolist() == [0, 1, 1, 3]
    # several classes may be one row, or the same rows in any order
    found = assign(source(names), head, {"kitten": 0, "puppy": [2, 1], "sparrow": 0, "stone": [1, 2]})
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert found.groups is not None and found.groups.tolist() == [0, 1, 1]
    found = assign(source(["a", "b"]), Rows(2), {"a": 1, "b": 0})
    assert rows_of(found) == [1, 0] and found.classes is None and found.groups is None


def test_label_maps_compare_names_as_folders_do() -> None:
    cafe = source([NFD("café"), "Dog", "dog"])
    label_map = {"CAFÉ": "Über", "dog": 0, "Dog": 1}
    assert rows_of(assign(cafe, Rows(3, ("a", "b", NFD("über"))), label_map)) == [2, 1, 0]
    not_assigned(["Dog", "dog"], Rows(2), label_map={"DOG": 0})


def test_label_maps_that_do_not_fit() -> None:
    head = Rows(6, ("cat", "dog", "big dog", "bird", "fish", "fish"))
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"a": 0}, ("1", "2", "b")),
        ({"a": 0, "B": 1, "\uff42": 1}, ("B",)),
        ({"a": 0, "b": 1, "c": 2}, ("c",)),
        ({"a": 0, "b": 6}, ("0 to 5", "b = 6")),
        ({"a": 0, "b": -1}, ("b = -1",)),
        ({"a": 0, "b": "horse"}, ("'b'", "'horse'")),
        ({"a": 0, "b": "fish"}, ("'fish'", "4, 5")),
        ({"a": 0, "b": True}, ("True",)),
        ({"a": 0, "b": 1.5}, ("'b'", "1.5")),
        ({"a": 0, "b": {"x": 1}}, ("'b'", "{'x': 1}")),
        ({"a": [0, 1], "b": [1, 2]}, ("1",)),
        ({"a": 0, "b": [0, 1]}, ("0",)),
        ({"a": [0, 0], "b": 1}, ("0, 0",)),
        ({"a": None, "b": []}, ()),
    ]
    for label_map, facts in cases:
        not_assigned(["a", "b"], head, *facts, label_map=label_map)
    not_assigned(["a", "b"], None, label_map={"a": 0, "b": "dog"})
    not_assigned(["a"], None, label_map={"a": -2})
    not_assigned(["a"], None, label_map={"a": 10**30})


def test_label_maps_in_files(tmp_path: Path) -> None:
    truth = {"a b": 3, "c": ["dog", 1], "d": [], "7": "cat"}
    (tmp_path / "m.json").write_text(json.dumps({**truth, "d": None}))
    (tmp_path / "m.toml").write_text('"a b" = 3\nc = ["dog", 1]\nd = []\n7 = "cat"\n')
    (tmp_path / "m.csv").write_text("class,row\r\na b,3\r\nc,dog\r\nc,1\r\n\r\nd,\r\n7,cat\r\n", newline="")
    (tmp_path / "bom.csv").write_text("class,row\na b,3\nc,dog\nc,1\nd,\n7,cat\n", "utf-8-sig")
    head = Rows(5, ("cat", "cow", "dog", "hen", "owl"))
    for file in ("m.json", "m.toml", "m.csv", "bom.csv"):
        found = assign(source(["7", "a b", "c", "d"], each=1), head, tmp_path / file)
        assert found.labels.tolist() == [0, 3, 1], file
        assert found.groups is not None and found.groups.tolist() == [0, 1, 1, 3], file


def test_files_that_are_no_label_maps(tmp_path: Path) -> None:
    cases = {
        "x.json": '{"a": 0, "a": 1}',
        "y.json": "[1, 2]",
        "z.json": "{",
        "x.toml": "a = = 1",
        "x.csv": "a,0\n",
        "y.csv": "class,row\na,0,1\n",
        "z.csv": "class,row\na,0\na,\n",
        "e.csv": "",
        "deep.json": "[" * 100_000,
        "deep.toml": "a = " + "[" * 100_000,
        "long.csv": "class,row\n" + "x" * 200_000 + ",1\n",
        "x.txt": "a 0",
    }
    for name, content in cases.items():
        (tmp_path / name).write_text(content)
        not_assigned(["a"], Rows(2), name, label_map=tmp_path / name)
    not_assigned(["a"], Rows(2), "nowhere.json", label_map=tmp_path / "nowhere.json")


def test_rows_are_checked() -> None:
    with refused(ValueError, "3", "2"):
        Rows(3, ("a", "b"))
    with refused(ValueError, "0"):
        Rows(0)


ODD = "cat dog fox owl élan café straße Ångström ﬁre 東京 サクラ αβγ ёж m² t-shirt c++ c# a.b".split()


def plainly(name: str) -> str:
    """What a name comes to, by the definition: NFKC, case folded, without spaces and underscores."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(letter for letter in text if not letter.isspace() and letter != "_")


@pytest.mark.parametrize("seed", range(40))
def test_odd_names_are_assigned_right_or_not_at_all(seed: int) -> None:
    random = Random(seed)
    pool = [*ODD, *(f"{a} {b}" for a in ODD for b in ODD[:6])]
    classes = random.sample(pool, random.choice([1, 2, 3, 10, 50]))
    row_of = {plainly(name): row for row, name in enumerate(classes)}

    def same(name: str) -> str:
        form = random.choice(["NFC", "NFD", "NFKC", "NFKD"])
        name = random.choice([name, name.casefold(), name.replace(" ", "_"), name.replace(" ", "")])
        return unicodedata.normalize(form, name)

    def other(name: str) -> str:
        return random.choice([f"{name}s", f"{name} 2", f"the {name}", f"{name}-", f"{name} (1)"])

    head = Rows(len(classes), tuple(map(same, classes)))
    names = sorted(map(same, classes))
    assert rows_of(assign(source(names), head)) == [row_of[plainly(name)] for name in names]
    changed = random.randint(1, len(classes))
    for wrong in (
        sorted([*map(other, classes[:changed]), *map(same, classes[changed:])]),
        sorted([*names, random.choice(names).upper()]),
    ):
        with pytest.raises(ValueError):
            assign(source(wrong), head)
    if len(classes) > 1:
        for fewer, rows in ((names, Rows(len(classes))), (names[1:], head)):
            with pytest.raises(ValueError):
                assign(source(fewer), rows)
    by_name = {same(name): same(classes[row_of[plainly(name)]]) for name in names}
    assert rows_of(assign(source(names), head, by_name)) == [row_of[plainly(name)] for name in names]


def test_an_id_decides_between_two_classes_of_one_name() -> None:
    """Of ImageNet's two missiles (and cranes) only one is in this part."""
    part = [SYNSETS.index(wnid) for wnid in ("n02012849", "n03773504", "n01440764")]
    rows = Rows(3, ("tench", "crane", "missile"))
    wnids = sorted(SYNSETS[row] for row in part)
    assert rows_of(assign(source(wnids), rows)) == [0, 1, 2]
    not_assigned([*wnids, "n04008634"], Rows(4, (*rows.names, "missile")), "n04008634")


def test_numbers_from_1_are_not_taken_for_the_order_of_a_head_of_imagenet() -> None:
    """ILSVRC2012_ID 1 is the kit fox, row 278."""
    numbers = sorted(map(str, range(1, 1001)))
    for names in ((), tuple(open_clip.IMAGENET_CLASSNAMES)):
        not_assigned(numbers, Rows(1000, names), "ILSVRC2012_ID")
        assert rows_of(assign(source(numbers), Rows(1000, names), "order"))[:2] == [0, 9]
        assert rows_of(assign(source(sorted(map(str, range(1000)))), Rows(1000, names)))[:3] == [0, 1, 10]


def test_a_number_in_csv_is_no_name_of_another_row(tmp_path: Path) -> None:
    file = tmp_path / "map.csv"
    file.write_text("class,row\na,1\nb,0\n")
    assert rows_of(assign(source("ab"), Rows(2, ("x", "1")), file)) == [1, 0]
    not_assigned("ab", Rows(2, ("1", "0")), "1", label_map=file)
