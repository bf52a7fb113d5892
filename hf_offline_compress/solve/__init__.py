"""Problems from plan and statistics, and their factors."""
