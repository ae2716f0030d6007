"""The over-optimisation laboratory. Proxies are trained on pairs that a known gold reward labelled. Best-of-n, PPO and
GRPO then push a policy towards a proxy, and the laboratory measures the gold reward. `grm lab` runs it;
docs/overoptimization.md describes it."""
