"""The over-optimisation laboratory: proxies trained on pairs that a known gold reward labelled, and what becomes of
the gold reward where a policy is pushed towards a proxy, by best-of-n, PPO and GRPO. `grm lab` runs it;
docs/overoptimization.md describes it."""
