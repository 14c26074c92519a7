package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawAnswer is what came back on the one stream; Reset is set when the server reset it or closed the connection.
type rawAnswer struct {
	HTTPStatus  string `json:"http_status,omitempty"`
	GRPCStatus  string `json:"grpc_status,omitempty"`
	GRPCMessage string `json:"grpc_message,omitempty"`
	Body        []byte `json:"body,omitempty"`
	Reset       string `json:"reset,omitempty"`
}

// runRaw sends one unary gRPC request as frames. It succeeds when the exchange came to an end, whatever the answer:
// the test judges that.
func runRaw(flags *flag.FlagSet, parse func() target) error {
	method := flags.String("method", "/v1beta1.KeyManagementService/Version", "path of the request")
	authority := flags.String("authority", "localhost", "value of :authority; empty leaves the header out")
	deadline := flags.String("grpc-timeout", "", "value of grpc-timeout, for example 1n; empty leaves the header out")
	message := flags.String("message", "", "the protobuf message in base64")
	to := parse()

	body, err := base64.StdEncoding.DecodeString(*message)
	if err != nil {
		return fmt.Errorf("-message: %w", err)
	}
	conn, err := net.Dial("unix", to.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(to.timeout)); err != nil {
		return err
	}

	headers := []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: *method},
	}
	if *authority != "" {
		headers = append(headers, hpack.HeaderField{Name: ":authority", Value: *authority})
	}
	headers = append(headers, hpack.HeaderField{Name: "content-type", Value: "application/grpc"},
		hpack.HeaderField{Name: "te", Value: "trailers"})
	if *deadline != "" {
		headers = append(headers, hpack.HeaderField{Name: "grpc-timeout", Value: *deadline})
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := sendRequest(conn, framer, headers, body); err != nil {
		return err
	}
	answer, err := readAnswer(framer)
	if err != nil {
		return err
	}
	printResult(answer)
	return nil
}

func sendRequest(conn io.Writer, framer *http2.Framer, headers []hpack.HeaderField, message []byte) error {
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return err
	}
	if err := framer.WriteSettings(); err != nil {
		return err
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range headers {
		if err := encoder.WriteField(field); err != nil {
			return err
		}
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID:      1,
		BlockFragment: block.Bytes(),
		EndHeaders:    true,
	}); err != nil {
		return err
	}
	// The five bytes of gRPC's length-prefixed message: not compressed, length.
	prefixed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	return framer.WriteData(1, true, append(prefixed, message...))
}

func readAnswer(framer *http2.Framer) (rawAnswer, error) {
	var answer rawAnswer
	for {
		frame, err := framer.ReadFrame()
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			answer.Reset = "connection closed"
			return answer, nil
		}
		if err != nil {
			return answer, err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				if err := framer.WriteSettingsAck(); err != nil {
					return answer, err
				}
			}
		case *http2.MetaHeadersFrame:
			answer.take(frame.Fields)
			if frame.StreamEnded() {
				return answer, nil
			}
		case *http2.DataFrame:
			answer.Body = append(answer.Body, frame.Data()...)
			if frame.StreamEnded() {
				return answer, nil
			}
		case *http2.RSTStreamFrame:
			answer.Reset = frame.ErrCode.String()
			return answer, nil
		case *http2.GoAwayFrame:
			answer.Reset = "GOAWAY " + frame.ErrCode.String()
			return answer, nil
		}
	}
}

func (a *rawAnswer) take(fields []hpack.HeaderField) {
	for _, field := range fields {
		switch field.Name {
		case ":status":
			a.HTTPStatus = field.Value
		case "grpc-status":
			a.GRPCStatus = field.Value
		case "grpc-message":
			a.GRPCMessage = field.Value
		}
	}
}
