package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/aes"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
)

func runStatus(_ *flag.FlagSet, parse func() target) error {
	to := parse()
	p, err := dialV2(context.Background(), to.endpoint(), to.timeout)
	if err != nil {
		return err
	}
	answer, err := p.status()
	if err != nil {
		return err
	}
	printResult(struct {
		Version string `json:"version"`
		Healthz string `json:"healthz"`
		KeyID   string `json:"key_id"`
	}{answer.Version, answer.Healthz, answer.KeyID})
	return nil
}

// runEncrypt prints what `decrypt -answer` takes back.
func runEncrypt(flags *flag.FlagSet, parse func() target) error {
	size := flags.Int("size", 32, "bytes of random plaintext; 0 and 10485760 are for the refusals")
	given := flags.String("plain", "", "the plaintext in base64, instead of a random one")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	plain := randomBytes(*size)
	if *given != "" {
		if plain, err = base64.StdEncoding.DecodeString(*given); err != nil {
			return fmt.Errorf("-plain: %w", err)
		}
	}
	cipher, err := p.encrypt(plain)
	if err != nil {
		return err
	}
	printResult(cipher)
	return nil
}

func runDecrypt(flags *flag.FlagSet, parse func() target) error {
	answer := flags.String("answer", "", "what encrypt printed")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	var cipher wrapped
	if err := json.Unmarshal([]byte(*answer), &cipher); err != nil {
		return fmt.Errorf("-answer: %w", err)
	}
	plain, err := p.decrypt(cipher)
	if err != nil {
		return err
	}
	printResult(struct {
		Plain []byte `json:"plain"`
	}{plain})
	return nil
}

func runRoundTrip(flags *flag.FlagSet, parse func() target) error {
	// "ping" of the health probe, a DEK, and the largest plaintext whose cipher stays within 1,024 bytes.
	list := flags.String("sizes", "4,32,963", "plaintext sizes")
	p, err := parse().dial(context.Background())
	if err != nil {
		return err
	}
	sizes, err := parseSizes(*list)
	if err != nil {
		return err
	}
	for _, size := range sizes {
		if err := roundTripOf(p, size); err != nil {
			return fmt.Errorf("%d bytes: %w", size, err)
		}
	}
	return nil
}

func roundTripOf(p plugin, size int) error {
	plain := randomBytes(size)
	first, err := roundTrip(p, plain)
	if err != nil {
		return err
	}
	second, err := roundTrip(p, plain)
	if err != nil {
		return err
	}
	if bytes.Equal(first.Cipher, second.Cipher) {
		return errors.New("the same plaintext twice gave the same cipher")
	}
	printResult(struct {
		Size       int    `json:"size"`
		CipherSize int    `json:"cipher_size"`
		KeyID      string `json:"key_id,omitempty"`
	}{size, len(first.Cipher), first.KeyID})
	return nil
}

// runEnvelope goes the whole way of a stored value. What it prints as stored is, after the prefix with the provider's
// name, what the API server would put into etcd.
func runEnvelope(flags *flag.FlagSet, parse func() target) error {
	text := flags.String("value", "a value", "what to store")
	to := parse()
	ctx := context.Background()
	var stored []byte
	var err error
	if to.api == "v2" {
		stored, err = envelopeV2(ctx, to, []byte(*text))
	} else {
		stored, err = envelopeV1(ctx, to, []byte(*text))
	}
	if err != nil {
		return err
	}
	printResult(struct {
		Stored []byte `json:"stored"`
	}{stored})
	return nil
}

// envelopeV1 reads back through a second transformer, whose cache is empty, so that the plugin has to decrypt.
func envelopeV1(ctx context.Context, to target, plain []byte) ([]byte, error) {
	p, err := dialV1(ctx, to.endpoint(), to.timeout)
	if err != nil {
		return nil, err
	}
	where := value.DefaultContext("/registry/secrets/default/example")
	stored, err := envelope.NewEnvelopeTransformer(p.service, 1, aes.NewGCMTransformer).TransformToStorage(ctx, plain, where)
	if err != nil {
		return nil, err
	}
	cold := envelope.NewEnvelopeTransformer(p.service, 1, aes.NewGCMTransformer)
	back, _, err := cold.TransformFromStorage(ctx, stored, where)
	if err != nil {
		return nil, err
	}
	return stored, sameOrError(plain, back)
}

// envelopeV2 wraps one seed as the API server does after a Status answer, with all its checks of the Encrypt answer.
func envelopeV2(ctx context.Context, to target, plain []byte) ([]byte, error) {
	p, err := dialV2(ctx, to.endpoint(), to.timeout)
	if err != nil {
		return nil, err
	}
	before, err := p.status()
	if err != nil {
		return nil, err
	}
	transformer, object, _, err := kmsv2.GenerateTransformer(ctx, uid, p.service, true)
	if err != nil {
		return nil, err
	}
	if object.KeyID != before.KeyID {
		return nil, fmt.Errorf("key id of Encrypt is %s, of Status %s", object.KeyID, before.KeyID)
	}
	if _, err := p.decrypt(wrapped{object.EncryptedDEKSource, object.KeyID, object.Annotations}); err != nil {
		return nil, err
	}
	where := value.DefaultContext("/registry/secrets/default/example")
	stored, err := transformer.TransformToStorage(ctx, plain, where)
	if err != nil {
		return nil, err
	}
	back, _, err := transformer.TransformFromStorage(ctx, stored, where)
	if err != nil {
		return nil, err
	}
	return stored, sameOrError(plain, back)
}

func sameOrError(wanted, got []byte) error {
	if !bytes.Equal(wanted, got) {
		return errors.New("the value read is not the value stored")
	}
	return nil
}

// runLateStart prints {"waiting":true} when its call is on the way; only then may the test start the server.
func runLateStart(_ *flag.FlagSet, parse func() target) error {
	to := parse()
	if _, err := os.Lstat(to.socket); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s exists already, so this would prove nothing", to.socket)
	}
	p, err := to.dial(context.Background())
	if err != nil {
		return err
	}
	started := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := roundTrip(p, randomBytes(32))
		done <- err
	}()
	printResult(struct {
		Waiting bool `json:"waiting"`
	}{true})
	if err := <-done; err != nil {
		return err
	}
	printResult(struct {
		ElapsedMs int64 `json:"elapsed_ms"`
	}{time.Since(started).Milliseconds()})
	return nil
}

func runTimeout(_ *flag.FlagSet, parse func() target) error {
	to := parse()
	p, err := to.dial(context.Background())
	if err != nil {
		return err
	}
	started := time.Now()
	_, err = p.encrypt(randomBytes(32))
	elapsed := time.Since(started)
	if err == nil {
		return errors.New("the server answered")
	}
	// The v1 client's own Version call hides its code in the text.
	if status.Code(err) != codes.DeadlineExceeded && !strings.Contains(err.Error(), "code = DeadlineExceeded") {
		return err
	}
	printResult(struct {
		ElapsedMs int64  `json:"elapsed_ms"`
		Error     string `json:"error"`
	}{elapsed.Milliseconds(), err.Error()})
	return nil
}
