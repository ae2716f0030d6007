"""Serving: the vLLM plugin that serves a GRM folder as it is, the routes that trainers call, and `grm serve`, which
has these routes without vLLM. The client is `grm_hf.rewards.remote`."""
