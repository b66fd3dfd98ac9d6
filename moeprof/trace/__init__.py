"""The trace format: schema, writer, reader, validator, synthetic traces."""
