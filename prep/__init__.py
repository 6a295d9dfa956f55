"""Offline preparation: a Hugging Face MoE checkpoint and calibration text go in, a bundle comes
out.

In pipeline order: `checkpoint` and `calibration` (what goes in), `profile` (statistics), `pack`
(experts to shards), `export` (backbone to ONNX segments), `verify` (bundle against original),
`build` (all of it). Each command of `smoe-prep` is one function of these modules. Nothing is
imported here: torch is slow to load.
"""
