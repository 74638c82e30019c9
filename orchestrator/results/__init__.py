"""The results of a campaign's run: gathered from the store, judged, written as a page with figures."""
