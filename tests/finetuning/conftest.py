"""Tiny models and drawn data that runs of every recipe train on, made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from drawn_data import draw_coco, draw_jsonl, draw_muge, draw_receipts, write_lines
from tiny_runs import CAPTIONS, CHINESE_CAPTIONS, boxes_document, convert_case


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are in one order whatever machine this is, and small ones are fastest so."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache_of_tables(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` writes below the home folder otherwise, which need not be there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "tables")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The converted model directory of a golden case, by its name in tiny_runs.MODELS."""
    return cache(lambda name: convert_case(name, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines: four pictures, the same question, answers of four words."""
    path = draw_jsonl(tmp_path_factory.mktemp("pairs"), len(CAPTIONS))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return write_lines(path, [{**row, "suffix": text} for row, text in zip(rows, CAPTIONS)])


@pytest.fixture(scope="session")
def muge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MUGE's files: four pictures with two Chinese captions each, which agree."""
    path = draw_muge(tmp_path_factory.mktemp("muge"), count=len(CHINESE_CAPTIONS), captions=1)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return write_lines(path, [{**row, "text": [text] * 2} for row, text in zip(rows, CHINESE_CAPTIONS)])


@pytest.fixture(scope="session")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four receipts and what they say as JSON, the part `train` of a folder."""
    return f"{draw_receipts(tmp_path_factory.mktemp('receipts'), {'train': 4, 'valid': 2, 'test': 2})}:train"


@pytest.fixture(scope="session")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO annotations of four pictures."""
    return draw_coco(tmp_path_factory.mktemp("boxes"), boxes_document())
