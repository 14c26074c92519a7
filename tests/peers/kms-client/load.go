package main

import (
	"context"
	"errors"
	"flag"
	"sort"
	"sync"
	"time"
)

// tally counts the calls of many goroutines, the failed ones by their text.
type tally struct {
	mu      sync.Mutex
	calls   int
	longest time.Duration
	errors  map[string]int
}

func newTally() *tally {
	return &tally{errors: map[string]int{}}
}

func (t *tally) record(elapsed time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls++
	t.longest = max(t.longest, elapsed)
	if err != nil {
		t.errors[err.Error()]++
	}
}

// finish prints the sum and is an error when any call failed.
func (t *tally) finish() error {
	failed := 0
	for _, count := range t.errors {
		failed += count
	}
	printResult(struct {
		Calls     int            `json:"calls"`
		Failed    int            `json:"failed"`
		LongestMs int64          `json:"longest_ms"`
		Errors    map[string]int `json:"errors"`
	}{t.calls, failed, t.longest.Milliseconds(), t.errors})
	if failed > 0 {
		return errors.New("calls failed")
	}
	return nil
}

// inParallel runs work in so many goroutines and waits for all.
func inParallel(goroutines int, work func()) {
	var group sync.WaitGroup
	for range goroutines {
		group.Add(1)
		go func() {
			defer group.Done()
			work()
		}()
	}
	group.Wait()
}

func runConcurrent(flags *flag.FlagSet, parse func() target) error {
	goroutines := flags.Int("goroutines", 100, "how many call at once, on one connection")
	calls := flags.Int("calls", 10, "round trips of each")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	sum := newTally()
	inParallel(*goroutines, func() {
		for range *calls {
			started := time.Now()
			_, err := roundTrip(p, randomBytes(32))
			sum.record(time.Since(started), err)
		}
	})
	return sum.finish()
}

// runLoop prints {"started":true} after its first good round trip; from then on the test may disturb the server. Its
// sum also says how long the longest call took, so that a test can see that the disturbance reached it.
func runLoop(flags *flag.FlagSet, parse func() target) error {
	duration := flags.Duration("duration", 10*time.Second, "how long")
	callers := flags.Int("callers", 4, "how many call at once")
	pause := flags.Duration("pause", 5*time.Millisecond, "rest of a caller between two round trips")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	if _, err := roundTrip(p, randomBytes(32)); err != nil {
		return err
	}
	printResult(struct {
		Started bool `json:"started"`
	}{true})

	sum := newTally()
	end := time.Now().Add(*duration)
	inParallel(*callers, func() {
		for time.Now().Before(end) {
			started := time.Now()
			_, err := roundTrip(p, randomBytes(32))
			sum.record(time.Since(started), err)
			time.Sleep(*pause)
		}
	})
	return sum.finish()
}

// runBench measures Decrypt of one 32-byte DEK: what an API server with a cold cache asks for.
func runBench(flags *flag.FlagSet, parse func() target) error {
	calls := flags.Int("calls", 10000, "Decrypts in all")
	callers := flags.Int("callers", 1, "how many call at once, on one connection")
	warmup := flags.Int("warmup", 1000, "Decrypts before that, not counted")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	cipher, err := p.encrypt(randomBytes(32))
	if err != nil {
		return err
	}
	if _, err := decryptMany(p, cipher, *callers, *warmup); err != nil {
		return err
	}
	started := time.Now()
	latencies, err := decryptMany(p, cipher, *callers, *calls)
	if err != nil {
		return err
	}
	elapsed := time.Since(started)

	sort.Slice(latencies, func(i, j int) bool { return latencies[i] < latencies[j] })
	microseconds := func(quantile float64) float64 {
		return float64(latencies[int(quantile*float64(len(latencies)-1))].Nanoseconds()) / 1000
	}
	printResult(struct {
		Calls     int     `json:"calls"`
		Callers   int     `json:"callers"`
		P50Us     float64 `json:"p50_us"`
		P90Us     float64 `json:"p90_us"`
		P99Us     float64 `json:"p99_us"`
		MaxUs     float64 `json:"max_us"`
		PerSecond float64 `json:"per_second"`
	}{
		len(latencies), *callers,
		microseconds(0.5), microseconds(0.9), microseconds(0.99), microseconds(1),
		float64(len(latencies)) / elapsed.Seconds(),
	})
	return nil
}

func decryptMany(p plugin, cipher wrapped, callers, calls int) ([]time.Duration, error) {
	var mu sync.Mutex
	var all []time.Duration
	var firstError error
	inParallel(callers, func() {
		own := make([]time.Duration, 0, calls/callers+1)
		var err error
		for i := 0; i < max(calls/callers, 1) && err == nil; i++ {
			started := time.Now()
			_, err = p.decrypt(cipher)
			own = append(own, time.Since(started))
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, own...)
		firstError = errors.Join(firstError, err)
	})
	return all, firstError
}
