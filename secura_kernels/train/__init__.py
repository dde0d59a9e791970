"""Beside training: calibration, what was kept, a budget, callbacks of transformers' Trainer."""
