"""Ladders of runs, scaling-law fits, efficiency gain and rank crossings (MAI-Thinking-1 report §2.2, §2.5.2)."""
