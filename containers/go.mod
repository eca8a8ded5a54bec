module github.com/fec20105/locker/containers

go 1.26.0
