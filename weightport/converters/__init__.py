"""The conversion engine: rule tables, operations that know their inverse, plans, and carrying them out both ways."""
