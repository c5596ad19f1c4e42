"""The agent's page, and the charts and styles that the page and the sweep's report share."""
