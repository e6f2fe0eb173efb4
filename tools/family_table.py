"""The table of families in docs/families.md: ``python3 tools/family_table.py [--check]``.

Nothing in it is typed by hand: every sample of ``tests/models/proofs.py`` is planned in every format, found again from
what the format would hold, and planned with an optimizer's state.  ``--check`` fails if the file is not what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.models.larger_models import NAMED, OF_CONTAINERS, WHOLES  # noqa: E402
from tests.models.proofs import PROOFS, Proof, Synthetic, in_training  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.errors import AnyckptError, MappingError, UsageError  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.formats.format import Format, WriteOptions  # noqa: E402
from anyckpt.operations.convert import convert  # noqa: E402
from anyckpt.operations.steps.naming import Naming  # noqa: E402
from anyckpt.operations.steps.renaming import rename_for  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
_NO = "no"

HEAD = """# Families

Made by `tools/family_table.py` from the registry and from `tests/models/proofs.py`; the tests fail if it is not
current. What an attempt gave is written here, not what somebody thought.

In a cell: **r** the family is recognised in such a checkpoint and read, **w** written, **o** an optimizer's state is
carried along by parameter; in brackets what only some of the family's samples can. Where no letter is, an error says
why. `safetensors`, `torch`, `lightning` and `dcp` take any names, those of every family and of none.

Each sample is taken to the hub and back, through every container here that takes it, and to two tensor (and expert)
parallel ranks and back, bit for bit, optimizer state included; its configuration goes through each framework's
spelling and back, equal in every field; each of its tensors is left out, added to and followed to its one place.
Besides,

- **tensors**: the hub's tensors are, bit for bit, those with which Megatron-Core computed transformers' logits
  (or Megatron-Bridge, for Gemma 2 and 3), and transformers computes these logits from what we write;
- **outputs**: transformers has the same names and shapes, and computes the same from what we write;
- **names**: names and shapes are those of published checkpoints, for transformers has no such class.

"""
LATER = """An optimizer's state by parameter changes names and layouts with its weights; as it is stored, it only moves
to where weights keep their names.

"""


@dataclass
class Cell:
    """What the samples of a family can in a format: the ability -> whether each sample can."""

    can: dict[str, list[bool]] = field(default_factory=dict)

    def add(self, ability: str, able: bool) -> None:
        self.can.setdefault(ability, []).append(able)

    @property
    def text(self) -> str:
        whole = "".join(letter for letter, able in self.can.items() if all(able))
        part = "".join(letter for letter, able in self.can.items() if any(able) and not all(able))
        return " ".join(filter(None, (whole, part and f"({part})"))) or "-"


def planned(checkpoint: Checkpoint, target: Format, folder: Path, optimizer: str) -> str | None:
    """Plan a conversion; None, or the problem."""
    try:
        convert(checkpoint, folder / "out", to=target.name, optimizer=optimizer, dry_run=True)
    except (MappingError, UsageError) as error:
        return error.problem
    return None


def recognised(checkpoint: Checkpoint, target: Format, family: str) -> bool:
    """Whether what the format would hold is found to be of the family, and complete."""
    try:
        held = rename_for(checkpoint, Naming(target)).checkpoint
        model = models.identify(replace(held, format=target.name))
        if model is None or model.family != family:
            return False
        models.to_hub(held, model)
    except AnyckptError:
        return False
    return True


def family_row(family: str, proof: Proof, targets: Iterable[Format], reasons: dict[str, list[str]]) -> list[str]:
    cells = {target.name: Cell() for target in targets}
    with TemporaryDirectory() as name:
        folder, source = Path(name), Path(name) / "source"
        source.mkdir()
        for sample in proof.samples:
            opened, model = sample.open()
            checkpoint = replace(opened, path=str(source))
            kept = in_training(checkpoint, model)
            for target in targets:
                problem = planned(checkpoint, target, folder, "drop")
                cell = cells[target.name]
                cell.add("r", problem is None and recognised(checkpoint, target, family))
                cell.add("w", problem is None)
                cell.add("o", problem is None and planned(kept, target, folder, "keep") is None)
                if problem is not None:
                    reasons.setdefault(problem, []).append(sample.name)
    title = models.by_name(family).title
    return [f"`{family}`", title, *(cell.text for cell in cells.values()), evidence(proof)]


def evidence(proof: Proof) -> str:
    """What proves the family, in words."""
    kinds: dict[str, list[str]] = {}
    for sample in proof.samples:
        kinds.setdefault(sample.shows, []).append(f"`{sample.name}`")
    found = [f"{shows} {', '.join(names)}" for shows, names in kinds.items()]
    return "; ".join([*found, *([proof.note] if proof.note else [])])


def format_row(known: Format, sample: Checkpoint, folder: Path) -> list[str]:
    names = known.dialect(WriteOptions()) or "any"
    optimizer = _NO
    if known.plan is not None:
        by_parameter = planned(sample, known, folder, "keep") is None
        stored = planned(registry.read(ROOT / "tests/fixtures/mcore/gpt_opt_plain/ckpt"), known, folder, "keep") is None
        optimizer = "by parameter" if by_parameter else "as it is stored" if stored and names == "any" else _NO
    return [
        f"`{known.name}`", known.title, "yes", _NO if known.plan is None else "yes", names, known.config_kind or "none",
        optimizer,
    ]  # fmt: skip


LARGER = """
## Models that also see or hear

`hf`, `megatron-core`, `megatron-core-zarr` and `megatron-bridge` keep them whole, the text part by its family's rules
and the others as they are; any type goes this way whose text part is of a family above. transformers loads every tensor
as it was after the way through Megatron's names, and the text part alone computes the same: """


def larger() -> str:
    """The larger models that are tested, each with the family of its text part."""
    named = ", ".join(f"`{kind}`" for kind in NAMED)
    return (
        f"{LARGER}{_told(WHOLES)}. Its names and shapes come back: {named}.\n\n"
        "Of these, Megatron has no model for the text part, and is refused; `hf`, `safetensors`, `torch` and `dcp` "
        f"keep them whole, and the text part alone computes the same: {_told(OF_CONTAINERS)}.\n"
    )


def _told(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for kind, values in kinds.items():
        config = {"model_type": kind, "architectures": ["Larger"], **values}
        model = models.identify(Checkpoint(kind, "hf", {}, dialect="hf", config=config, config_kind="hf"))
        assert model is not None, kind
        told.append(f"`{kind}` ({model.family})")
    return ", ".join(told)


def provenance() -> str:
    """Where the samples that nobody computed come from."""
    known = [s for proof in PROOFS.values() for s in proof.samples if isinstance(s, Synthetic)]
    lines = [f"- `{sample.name}`: {sample.provenance}\n" for sample in known]
    return "".join(["\n## Where names and shapes were seen\n\n", *lines]) if lines else ""


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    known = sorted(registry.built_in().values(), key=lambda format: format.name)
    targets = [format for format in known if format.config_kind is not None]
    reasons: dict[str, list[str]] = {}
    rows = [family_row(family, PROOFS[family], targets, reasons) for family in sorted(PROOFS)]
    text = HEAD + table(["family", "models", *(f"`{t.name}`" for t in targets), "proof"], rows)
    text += "\n## Where a sample cannot go\n\n"
    text += "".join(
        f"- {problem}: {', '.join(f'`{n}`' for n in dict.fromkeys(who))}\n" for problem, who in reasons.items()
    )
    with TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        sample = replace(in_training(*PROOFS["llama"].samples[0].open()), path=str(source))
        listed = [format_row(format, sample, Path(name)) for format in known]
    text += larger() + provenance() + "\n## Formats\n\n"
    return (
        text + LATER + table(["`--to`", "what it is", "read", "write", "names", "configuration", "optimizer"], listed)
    )


def main() -> None:
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/families.md is not current: run python3 tools/family_table.py")


if __name__ == "__main__":
    main()
