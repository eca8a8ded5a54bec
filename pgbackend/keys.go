package pgbackend

import (
	"crypto/sha256"
	"encoding/binary"
)

// keyspace are the advisory locks of one key. PostgreSQL names them by 64 bits, so each is a part of a hash of prefix and
// key: two keys meet by chance once in 2^64, and nobody can make them meet on purpose.
type keyspace struct {
	lock int64 // held by the holder
	gate int64 // held by the first of those who wait, and wanted by the others
	// mark begins the name of a third lock, a pair of int4, in which the holder keeps its token for others to see: 24 bits
	// of the hash, then the lowest 40 of the token.
	mark int32
}

func spaceOf(prefix, key string) keyspace {
	sum := sha256.Sum256([]byte(prefix + "\x00" + key))
	return keyspace{
		lock: int64(binary.BigEndian.Uint64(sum[0:])),
		gate: int64(binary.BigEndian.Uint64(sum[8:])),
		mark: int32(binary.BigEndian.Uint32(sum[16:])) &^ 0xff,
	}
}

// LockID is the advisory lock that stands for a key: the first 64 bits of the SHA-256 of prefix, a NUL byte and key. With it
// an administrator finds the lock in pg_locks, as classid (the upper half) and objid (the lower) with objsubid 1, and a
// program that is not written in Go takes the same lock.
func LockID(prefix, key string) int64 { return spaceOf(prefix, key).lock }

const tokenBits = 40 // of a token that are kept in a mark

// marked is the pair that keeps a token.
func (k keyspace) marked(token uint64) (class, object int32) {
	return k.mark | int32(token>>32&0xff), int32(uint32(token))
}

// unmarked is the token that a pair keeps: the greatest with these bits that is not above the newest token of all.
func unmarked(class, object int32, newest uint64) uint64 {
	const span = 1 << tokenBits
	token := newest&^(span-1) | uint64(class&0xff)<<32 | uint64(uint32(object))
	if token > newest && token >= span {
		token -= span
	}
	return token
}
