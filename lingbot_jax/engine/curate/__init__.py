"""Any folder of videos to training clips (paper sections 2.1.1, 2.2, 2.3; docs/curation.md)."""
