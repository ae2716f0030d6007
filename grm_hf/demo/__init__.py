"""The demo: a Bradley-Terry model and GRM, trained on real pairs from the real base. `grm demo` runs it."""
