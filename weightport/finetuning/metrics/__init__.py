"""Metrics on generations: what a model answered, held against what it should have answered."""

from __future__ import annotations

from weightport.finetuning.metrics.scores import Metric, Scores
from weightport.finetuning.metrics.table import METRICS, metric_named, score_all

__all__ = ["METRICS", "Metric", "Scores", "metric_named", "score_all"]
