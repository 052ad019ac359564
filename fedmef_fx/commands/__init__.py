"""The commands of `fedmef-fx`, one per file; `fedmef_fx.cli` puts them together."""
