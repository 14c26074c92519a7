// Command kms-client calls a KMS plugin with kube-apiserver's own client code, for the tests to start.
//
//	kms-client COMMAND -socket PATH [-api v1|v2] [-timeout 3s] [flags of the command]
//
// It prints one JSON object a line. Exit status: 0 all went as the command promises, 1 it did not (the last line says
// what and why), 2 wrong usage.
//
// It must never dial, name itself or retry in a way of its own where kube-apiserver's code does that: the `:authority`
// a real client sends is what is under test. Only `raw` speaks for itself, to send what no sound client would.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"google.golang.org/grpc/status"
)

// target is where a command calls and how, from the flags that all commands share.
type target struct {
	socket  string
	api     string
	timeout time.Duration
}

// command runs one subcommand: it defines its flags, parses its arguments by calling parse, and calls the target.
type command struct {
	about string
	run   func(flags *flag.FlagSet, parse func() target) error
}

var commands = map[string]command{
	"status":     {"v2 only: calls Status", runStatus},
	"encrypt":    {"encrypts one plaintext and prints the answer", runEncrypt},
	"decrypt":    {"decrypts one cipher and prints the plaintext", runDecrypt},
	"round-trip": {"encrypts twice and decrypts random plaintexts of the given sizes", runRoundTrip},
	"envelope":   {"stores and reads values through the API server's envelope transformer", runEnvelope},
	"late-start": {"calls while the socket does not exist yet and waits for it", runLateStart},
	"timeout":    {"calls a silent server and expects to be let go at the deadline", runTimeout},
	"concurrent": {"many goroutines on one connection", runConcurrent},
	"loop":       {"round trips for some time, to be disturbed by the test", runLoop},
	"bench":      {"latency and rate of Decrypt", runBench},
	"raw":        {"sends one request frame by frame, with headers of the caller's choice", runRaw},
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	chosen, ok := commands[os.Args[1]]
	if !ok {
		usage()
	}

	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	var to target
	flags.StringVar(&to.socket, "socket", "", "path of the plugin's socket")
	flags.StringVar(&to.api, "api", "v1", "v1 or v2")
	flags.DurationVar(&to.timeout, "timeout", 3*time.Second, "timeout of one call, as in the EncryptionConfiguration")
	parse := func() target {
		_ = flags.Parse(os.Args[2:]) // ExitOnError
		if to.socket == "" || (to.api != "v1" && to.api != "v2") || flags.NArg() > 0 {
			flags.Usage()
			os.Exit(2)
		}
		return to
	}

	if err := chosen.run(flags, parse); err != nil {
		printResult(failureOf(os.Args[1], err))
		os.Exit(1)
	}
}

func usage() {
	names := make([]string, 0, len(commands))
	for name := range commands {
		names = append(names, name)
	}
	sort.Strings(names)
	fmt.Fprintln(os.Stderr, "usage: kms-client COMMAND -socket PATH [-api v1|v2] [-timeout 3s] ...")
	for _, name := range names {
		fmt.Fprintf(os.Stderr, "  %-11s %s\n", name, commands[name].about)
	}
	os.Exit(2)
}

// failure is the last line of a command that did not do what it promises.
type failure struct {
	Command string `json:"command"`
	OK      bool   `json:"ok"`
	Code    string `json:"code"`
	Error   string `json:"error"`
}

// failureOf names the gRPC code of err; the v1 client hides that of a failed Version call, which then reads Unknown.
func failureOf(command string, err error) failure {
	return failure{Command: command, Code: status.Code(err).String(), Error: err.Error()}
}

func printResult(result any) {
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// endpoint is the form in which an EncryptionConfiguration names the socket.
func (to target) endpoint() string {
	return "unix://" + to.socket
}

// dial makes the client. Like in kube-apiserver this connects in the background, so it also works without a server.
func (to target) dial(ctx context.Context) (plugin, error) {
	if to.api == "v2" {
		return dialV2(ctx, to.endpoint(), to.timeout)
	}
	return dialV1(ctx, to.endpoint(), to.timeout)
}

// parseSizes reads "4,32,963".
func parseSizes(list string) ([]int, error) {
	var sizes []int
	for _, field := range strings.Split(list, ",") {
		var size int
		if _, err := fmt.Sscanf(field, "%d", &size); err != nil || size < 0 {
			return nil, fmt.Errorf("not a size: %q", field)
		}
		sizes = append(sizes, size)
	}
	return sizes, nil
}
