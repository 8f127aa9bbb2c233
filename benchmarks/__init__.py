"""Benchmarks: `python -m benchmarks` runs them all, `python -m benchmarks --help` lists them.

harness.py   how a number comes about: runs, warm-up, peers in turn, goals
meters.py    time and peak memory, one class per kind of device
machine.py   what a number depends on: processor, versions, commit
report.py    tables, CSV files, plots
inputs.py    inputs that several cases share, and the flat indexer in plain torch
drift.py     inputs on a GPU whose queries drift from row to row
summary.py   the README's table, and speedups.py its plot
cases/       one small file per question

tilelang_peer.py is the authors' own HISA as a peer; --tilelang PATH says where it is.
deepgemm_peer.py is the fastest public flat indexer; --deepgemm PATH says where it is.
"""
