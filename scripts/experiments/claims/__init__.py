"""Studies of what papers claim: one module for each topic, with the results in docs/claims.md."""
