package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmsservice "k8s.io/kms/pkg/service"
)

// Every v2 call carries a UID of its own; the API server makes it from a UUID.
const uid = "6fa9a1c4-5a44-4c4f-a2b4-3f0a5d0c7f10"

// wrapped is what an Encrypt answered. KeyID and Annotations exist in v2 only.
type wrapped struct {
	Cipher      []byte            `json:"cipher"`
	KeyID       string            `json:"key_id,omitempty"`
	Annotations map[string][]byte `json:"annotations,omitempty"`
}

// plugin is a KMS plugin seen through kube-apiserver's client, v1 or v2.
type plugin interface {
	encrypt(plain []byte) (wrapped, error)
	decrypt(cipher wrapped) ([]byte, error)
}

type pluginV1 struct {
	service envelope.Service
}

// dialV1 makes the client of a `kms: {apiVersion: v1}` stanza. Before its first call it checks Version by itself.
func dialV1(ctx context.Context, endpoint string, timeout time.Duration) (pluginV1, error) {
	service, err := envelope.NewGRPCService(ctx, endpoint, timeout)
	return pluginV1{service}, err
}

func (p pluginV1) encrypt(plain []byte) (wrapped, error) {
	cipher, err := p.service.Encrypt(plain)
	if err == nil && len(cipher) == 0 {
		err = errors.New("an empty cipher, which kube-apiserver would store")
	}
	return wrapped{Cipher: cipher}, err
}

func (p pluginV1) decrypt(cipher wrapped) ([]byte, error) {
	return p.service.Decrypt(cipher.Cipher)
}

type pluginV2 struct {
	service kmsservice.Service
}

// dialV2 makes the client of a `kms: {apiVersion: v2}` stanza.
func dialV2(ctx context.Context, endpoint string, timeout time.Duration) (pluginV2, error) {
	service, err := kmsv2.NewGRPCService(ctx, endpoint, "kms-plugin", timeout)
	return pluginV2{service}, err
}

func (p pluginV2) encrypt(plain []byte) (wrapped, error) {
	answer, err := p.service.Encrypt(context.Background(), uid, plain)
	if err != nil {
		return wrapped{}, err
	}
	if _, err := kmsv2.ValidateKeyID(answer.KeyID); err != nil {
		return wrapped{}, fmt.Errorf("key id of Encrypt: %w", err)
	}
	return wrapped{answer.Ciphertext, answer.KeyID, answer.Annotations}, nil
}

func (p pluginV2) decrypt(cipher wrapped) ([]byte, error) {
	return p.service.Decrypt(context.Background(), uid, &kmsservice.DecryptRequest{
		Ciphertext:  cipher.Cipher,
		KeyID:       cipher.KeyID,
		Annotations: cipher.Annotations,
	})
}

// status calls Status and judges the answer as kube-apiserver's health probe does.
func (p pluginV2) status() (*kmsservice.StatusResponse, error) {
	answer, err := p.service.Status(context.Background())
	if err != nil {
		return nil, err
	}
	if answer.Healthz != "ok" {
		return nil, fmt.Errorf("healthz is %q", answer.Healthz)
	}
	if answer.Version != "v2" && answer.Version != "v2beta1" {
		return nil, fmt.Errorf("version is %q", answer.Version)
	}
	if _, err := kmsv2.ValidateKeyID(answer.KeyID); err != nil {
		return nil, fmt.Errorf("key id of Status: %w", err)
	}
	return answer, nil
}

// roundTrip encrypts plain and wants it back.
func roundTrip(p plugin, plain []byte) (wrapped, error) {
	cipher, err := p.encrypt(plain)
	if err != nil {
		return wrapped{}, fmt.Errorf("encrypt: %w", err)
	}
	back, err := p.decrypt(cipher)
	if err != nil {
		return wrapped{}, fmt.Errorf("decrypt: %w", err)
	}
	if !bytes.Equal(plain, back) {
		return wrapped{}, errors.New("decrypt answered another plaintext, and no error")
	}
	return cipher, nil
}

func randomBytes(size int) []byte {
	bytes := make([]byte, size)
	_, _ = rand.Read(bytes) // never fails
	return bytes
}
