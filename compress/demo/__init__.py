"""The demo that ships with Lightpress: a tiny trained checkpoint and the grammar its text comes from."""
