"""Parts of this package inside other people's projects; each module needs the toolkit it names."""
