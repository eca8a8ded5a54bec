#!/bin/sh
# Starts PostgreSQL as the official images do, as far as the tests need it: it makes the data at the first start, and
# takes the server's own arguments.
set -e
bin=$(echo /usr/lib/postgresql/*/bin)
data=${PGDATA:-/var/lib/postgresql/data}
if [ ! -e "$data/PG_VERSION" ]; then
	"$bin/initdb" -D "$data" -U postgres -A trust -E UTF8 --locale=C --no-sync
	echo "host all all all trust" >>"$data/pg_hba.conf"
fi
exec "$bin/postgres" -D "$data" -c 'listen_addresses=*' -c unix_socket_directories=/var/lib/postgresql "$@"
