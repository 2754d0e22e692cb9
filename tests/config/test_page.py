from dataclasses import dataclass
from typing import Literal

from ssod_imwa.config.options import Options, option
from ssod_imwa.config.page import keys_page
from ssod_imwa.config.sections import Section


@dataclass(frozen=True)
class LossOptions(Options):
    name: Literal["ce", "focal"] = option("ce", "of the loss", free=True)


@dataclass(frozen=True)
class FocalOptions(Options):
    gamma: float = option(1.0, "exponent | power", above=0)
    steps: list[int] = option([2], "of it", iterations=True)


CLASSES = {"TASK": ("classes",)}
SECTIONS = [
    Section("LOSS", LossOptions, CLASSES),
    Section("LOSS", FocalOptions, {**CLASSES, "LOSS.NAME": ("focal", "other")}),
]


def test_every_section_is_a_table_that_says_when_it_is_read():
    page = keys_page({"Classes": SECTIONS})
    assert "A resumed run may change: `LOSS.NAME`.\n" in page
    assert "iterations: `LOSS.STEPS`.\n" in page
    assert page.partition("## Classes\n")[2].split("\n\n") == [
        "\n### LOSS",  # what holds for the whole chapter is not repeated
        "| key | default | allowed | meaning |\n|---|---|---|---|\n"
        "| `LOSS.NAME` | `'ce'` | `'ce'`, `'focal'` | of the loss |",
        "### LOSS",
        "Read with `LOSS.NAME` = `focal` or `other`.",
        "| key | default | allowed | meaning |\n|---|---|---|---|\n"
        "| `LOSS.GAMMA` | `1.0` | number, above 0 | exponent \\| power |\n"
        "| `LOSS.STEPS` | `[2]` | list of: integer | of it |\n",
    ]
