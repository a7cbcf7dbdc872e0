"""From a study file to a `ResolvedStudy`: profile, overrides, rules, extensions, services."""
