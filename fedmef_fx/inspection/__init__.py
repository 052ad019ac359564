"""Looking into rewritten graphs: text, tables, differences."""
