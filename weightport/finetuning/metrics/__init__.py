"""Metrics on generations: what a model answered, held against what it should have answered."""

from __future__ import annotations

from weightport.finetuning.metrics.scores import Metric, Scores
from weightport.finetuning.metrics.table import METRICS, headline, metric_named, score_all

__all__ = ["METRICS", "Metric", "Scores", "headline", "metric_named", "score_all"]
