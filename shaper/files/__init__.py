"""Files as people have them: text in any usual form, tables, recordings' rows."""
