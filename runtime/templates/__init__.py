"""Jinja for untrusted templates: the sandbox, what things in it cost, and who counts."""
