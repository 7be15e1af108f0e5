"""Benchmarks: questions, answers, scores and the pages that show them."""
