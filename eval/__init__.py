"""A saved model, or a folder of videos, to numbers with error bars and a report."""
