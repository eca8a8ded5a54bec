package etcdbackend

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLogger hands what the client library logs to a slog.Logger. Left alone, the library writes to stderr.
func zapLogger(to *slog.Logger) *zap.Logger {
	return zap.New(&slogCore{to: to.With("component", "etcd client")})
}

// slogCore is a zapcore.Core over a slog.Logger.
type slogCore struct{ to *slog.Logger }

func (c *slogCore) Enabled(level zapcore.Level) bool {
	return c.to.Enabled(context.Background(), slogLevel(level))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{to: c.to.With(attributes(fields)...)}
}

func (c *slogCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.to.Log(context.Background(), slogLevel(e.Level), e.Message, attributes(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func attributes(fields []zapcore.Field) []any {
	values := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(values)
	}
	var list []any
	for name, value := range values.Fields {
		list = append(list, name, value)
	}
	return list
}

func slogLevel(level zapcore.Level) slog.Level {
	switch {
	case level >= zapcore.ErrorLevel:
		return slog.LevelError
	case level == zapcore.WarnLevel:
		return slog.LevelWarn
	case level == zapcore.InfoLevel:
		return slog.LevelDebug // of interest to those who look for a fault
	default:
		return slog.LevelDebug
	}
}
