package conformance

import "slices"

// allRows is the table of the whole suite, in the order of reading.
func allRows() []row {
	return slices.Concat(
		networkRows, // first of all, that the faults are real
		contractRows,
		cleanupRows,
		exclusionRows,
		expiryRows,
		clockRows,
		lossRows,
		workRows,
		restartRows,
		clusterRows,
		isolatedRows,
		lateRows,
		deadWaiterRows,
		fencingRows,
		waitingRows,
		waitedRows,
		operatorRows,
		hygieneRows,
	)
}
