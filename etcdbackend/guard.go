package etcdbackend

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
)

// Guard makes writes to etcd under the token of a lock, and refuses those of writers whose lock was lost: beside the data
// stands the greatest token that has written, and a write with an older one changes nothing. That protects data even from
// a writer that was stopped for an hour and does not know yet that its lock is gone.
//
// The tokens must be those of one key of one set of etcd servers; the data may be on other servers.
type Guard struct{ client *clientv3.Client }

// NewGuard makes a Guard on a client, which need not be the one that the locks are on.
func NewGuard(client *clientv3.Client) *Guard { return &Guard{client: client} }

// Write makes the writes of one transaction under the token of a lock that protects them. The key fence keeps the
// greatest token; every writer of the same data names the same. Write answers [locker.ErrStaleToken], and changes
// nothing, if a greater token has written before. The same token may write any number of times.
func (g *Guard) Write(ctx context.Context, fence string, token uint64, writes ...clientv3.Op) (*clientv3.TxnResponse, error) {
	if token == 0 {
		return nil, &locker.Error{Op: "guard", Key: fence, Backend: name, Err: errors.New("the token is zero: give that of a held lock")}
	}
	text := fmt.Sprintf("%020d", token) // texts of one length are ordered like their numbers
	resp, err := g.client.Txn(ctx).
		If(clientv3.Compare(clientv3.Value(fence), ">", text)). // no, if there is none
		Else(append([]clientv3.Op{clientv3.OpPut(fence, text)}, writes...)...).
		Commit()
	if err != nil {
		return nil, &locker.Error{Op: "guard", Key: fence, Backend: name, Err: explain(err)}
	}
	if resp.Succeeded {
		return nil, fmt.Errorf("%w: %q was written with a greater token than %d", locker.ErrStaleToken, fence, token)
	}
	return resp, nil
}
