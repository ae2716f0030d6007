"""The embedded default: a small world whose gold reward is known exactly, a base model that speaks its language, and a
run that compares the Bradley-Terry baseline with GRM there. `grm demo` runs it; docs/demo_world.md describes it."""
